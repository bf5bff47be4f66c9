"""Shards of pictures, and indexes over them that are made without Ray."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.reading import Files, read_pictures, wanted
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


def parquet_of(files: Mapping[str, bytes | None], *, row_group_size: int = 4) -> bytes:
    """A Parquet file as Hugging Face writes it, with a row for each file."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    table = pa.table({"label": list(range(len(rows))), "image": pa.array(rows, kind)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_size)
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


def read_all(pictures: Pictures) -> dict[str, Files | str]:
    keys = pictures.keys.take(np.arange(len(pictures)))
    columns = {name: keys[name].to_numpy() for name in keys.column_names}
    found = read_pictures(wanted(columns, range(len(pictures))), pictures.places)
    return {picture.key: files for picture, files in found}


def quarantine(pictures: Pictures) -> dict[str, tuple[str, str]]:
    table = pq.read_table(f"{pictures.uri}/quarantine-{pictures.version}.parquet").to_pylist()
    return {row["key"]: (row["status"], row["detail"]) for row in table}


def summary(pictures: Pictures) -> dict[str, int]:
    return json.loads(Path(pictures.uri, "summary.json").read_text())
