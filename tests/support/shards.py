"""Shards of pictures, and indexes over them that are made without Ray."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from pipelines.data.pictures import Pictures, find_pictures
from pipelines.index.merge import merge
from pipelines.index.scan import Settings, chunks, part_name, scan_chunk
from pipelines.infra.listing import list_files


def tar_of(files: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar with some members, by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def indexed(folder: str, out: Path, *, min_side: int = 32) -> Pictures:
    """What the command would write, in this process."""
    settings, uri = Settings(folder, "", min_side), f"{out}.index"
    parts, num_others = [], 0
    files = list(list_files(folder))
    found = [file for file in files if file.is_image or file.is_shard]
    for chunk in chunks(found):
        parts.append(f"{uri}/parts/{part_name(chunk, {}, settings)}.parquet")
        scan_chunk(chunk, [None] * len(chunk), settings, parts[-1])
    num_others = len(files) - len(found)
    merge(parts, settings, uri, num_others)
    return find_pictures(uri)
