"""Scans a folder into an index: reuses earlier results and scans the rest with Ray Data."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

from pyarrow import fs

from ctmsr.errors import DataError

from ..infra.listing import Listed, iter_images, list_files, stem
from ..infra.progress import Screen
from ..infra.ray_data import map_rows
from ..infra.storage import open_uri
from .merge import merge
from .progress import ScanProgress
from .scan import Settings, chunks, part_name, scan_chunk

_STOPPED = "the scan stopped; run the same command again to resume it."
_ROUND_CHUNKS = 64
"""Chunks of the listing to plan at a time."""


def build_index(settings: Settings, out: str) -> dict[str, Any]:
    """Scans what has not been scanned before and writes the index; returns its summary.

    Raises:
        DataError: No picture is usable, or the store fails.
    """
    lq = _lq_pictures(settings.lq_uri) if settings.lq_uri else {}
    file_system, root = open_uri(out)
    listing = file_system.get_file_info(fs.FileSelector(f"{root}/parts", allow_not_found=True))
    existing = {info.base_name for info in listing}
    num_others = 0

    def counted() -> Iterator[Listed]:
        nonlocal num_others
        for file in list_files(settings.uri):
            if file.is_image or (file.is_shard and not settings.lq_uri):  # pairs are files of their own
                yield file
            else:
                num_others += 1

    names: list[str] = []
    cut = chunks(counted())
    with Screen() as screen:
        progress = ScanProgress(settings.uri, screen)
        while some := list(islice(cut, _ROUND_CHUNKS)):
            todo = []
            for chunk in some:
                names.append(f"{part_name(chunk, lq, settings)}.parquet")
                if names[-1] in existing:
                    progress.reused += len(chunk)
                    continue
                lq_keys = [pair.key if (pair := lq.get(stem(file.key))) else None for file in chunk]
                files = [asdict(file) for file in chunk]
                todo.append({"files": files, "lq_keys": lq_keys, "part_uri": f"{out}/parts/{names[-1]}"})
            if todo:
                _scan(todo, settings, progress)
        progress.end()
    return merge([f"{root}/parts/{name}" for name in names], settings, out, num_others)


def _lq_pictures(uri: str) -> dict[str, Listed]:
    """The LR pictures by stem."""
    found: dict[str, Listed] = {}
    for file in iter_images(uri):
        if file.problem:
            raise DataError(file.problem)
        if other := found.get(stem(file.key)):
            raise DataError(
                f"{uri} has both {other.key} and {file.key}, so pairs are ambiguous. Rename or remove one."
            )
        found[stem(file.key)] = file
    return found


def _scan(todo: list[dict[str, Any]], settings: Settings, progress: ScanProgress) -> None:
    def scan(row: dict[str, Any]) -> dict[str, Any]:
        chunk = [Listed(**file) for file in row["files"]]
        num_pictures = scan_chunk(chunk, row["lq_keys"], settings, row["part_uri"])
        return {
            "files": len(chunk),
            "pictures": num_pictures,
            "bytes": sum(file.size for file in chunk),
        }

    for done in map_rows(todo, scan, _STOPPED):
        progress.show(done["files"], done["pictures"], done["bytes"])
