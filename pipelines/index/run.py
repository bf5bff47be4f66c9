"""Scans a folder into an index: reuses earlier results and scans the rest with Ray Data."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from typing import Any

import ray.data
from pyarrow import fs

from ctmsr.errors import DataError

from ..infra.exit_status import root_cause
from ..infra.listing import Listed, iter_images, list_files, stem
from ..infra.progress import Bar, Screen, duration
from ..infra.ray_data import configured
from ..infra.storage import open_uri
from .merge import merge
from .scan import Settings, chunks, part_name, scan_chunk

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
    num_files = 0

    def counted() -> Iterator[Listed]:
        nonlocal num_files
        for file in list_files(settings.uri):
            num_files += 1
            if file.is_image:
                yield file

    names: list[str] = []
    cut = chunks(counted())
    with Screen() as screen:
        progress = _ScanProgress(settings.uri, screen)
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
    return merge([f"{root}/parts/{name}" for name in names], settings, out, num_files)


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


def _scan(todo: list[dict[str, Any]], settings: Settings, progress: "_ScanProgress") -> None:
    def scan(row: dict[str, Any]) -> dict[str, Any]:
        chunk = [Listed(**file) for file in row["files"]]
        scan_chunk(chunk, row["lq_keys"], settings, row["part_uri"])
        return {"pictures": len(chunk), "bytes": sum(file.size for file in chunk)}

    blocks = ray.data.from_items(todo, override_num_blocks=len(todo))
    try:
        for done in configured(blocks.map(scan)).iter_rows():
            progress.show(done["pictures"], done["bytes"])
    except ray.exceptions.RayError as error:
        raise DataError(
            f"the scan stopped; run the same command again to resume it. {root_cause(error)}"
        ) from error


class _ScanProgress:
    """The progress: pictures/s, MB/s and the time left.

    The scan lists the folder as it goes, so the total comes from a second listing that only counts.
    """

    def __init__(self, uri: str, screen: Screen) -> None:
        self._started = time.monotonic()
        self._screen = screen
        self._pictures, self._bytes = 0, 0
        self._listed, self._is_whole = 0, False
        self.reused = 0
        """Pictures whose results were there already."""
        threading.Thread(target=self._count, args=(uri,), daemon=True).start()

    def _count(self, uri: str) -> None:
        with suppress(DataError):  # the scan hits the same error and reports it
            for _ in iter_images(uri):
                self._listed += 1
            self._is_whole = True

    def show(self, pictures: int, num_bytes: int) -> None:
        self._pictures, self._bytes = self._pictures + pictures, self._bytes + num_bytes
        self._screen.show(self._bar())

    def end(self) -> None:
        self._screen.end()
        self._screen.say(str(self._bar()))

    def _bar(self) -> Bar:
        elapsed_s = time.monotonic() - self._started
        rate = self._pictures / elapsed_s
        facts = [f"{rate:.0f}/s", f"{self._bytes / 1e6 / elapsed_s:.1f} MB/s"]
        if self.reused:
            facts.append(f"{self.reused} scanned before")
        done = self.reused + self._pictures
        left = max(0, self._listed - done) if self._is_whole else 0
        if left:
            facts = [f"{left} to go, ETA {duration(left / max(rate, 1e-3))}", *facts]
        return Bar(f"scanned {self._pictures} pictures", done, done + left if left else 0, tuple(facts))
