"""Scans a folder into an index: reuses earlier results and scans the rest with Ray Data."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from pyarrow import fs

from ctmsr.errors import DataError

from ..data.keys import BATCH_ROWS, index_file, keys_file, write_keys
from ..data.pictures import INDEX_FORMAT, SUMMARY_FILE
from ..infra.exit_status import root_cause
from ..infra.listing import Listed, iter_images, list_files, stem
from ..infra.progress import Bar, Screen, duration
from ..infra.ray_data import configured
from ..infra.storage import open_uri, read_bytes, write_bytes
from .scan import SCHEMA, Settings, chunks, part_name, scan_chunk, write_table

_ROUND_CHUNKS = 64
"""Chunks of the listing to plan at a time."""
_READ_THREADS = 8


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


def merge(parts: list[str], settings: Settings, out: str, num_files: int) -> dict[str, Any]:
    """Writes the index from the parts; works on whole Arrow columns, as there may be ten million rows."""
    file_system, _ = open_uri(out)

    def read(part: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(read_bytes(file_system, part)), schema=SCHEMA)

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        table = pa.concat_tables(pool.map(read, parts)).combine_chunks()
    table = _mark_scales(_mark_duplicates(table))
    is_good = pc.equal(table["status"], "ok")
    good, bad = table.filter(is_good), table.filter(pc.invert(is_good))
    reasons = {one["values"]: one["counts"] for one in pc.value_counts(bad["status"]).to_pylist()}
    if not len(good):
        raise DataError(f"none of the {len(table)} pictures under {settings.uri} are usable: {reasons}.")
    names = ["key", "lq_key"] if settings.lq_uri else ["key"]
    version = _version(good.select(["key", "sha256", *(["lq_key", "lq_sha256"] if settings.lq_uri else [])]))
    index = good.drop_columns(
        ["status", "detail", *([] if settings.lq_uri else ["lq_key", "lq_sha256", "scale"])]
    )
    write_table(index, f"{out}/{index_file(version)}")
    with TemporaryDirectory() as folder:
        write_keys(good.to_batches(BATCH_ROWS), names, keys := Path(folder) / "keys")
        write_bytes(f"{out}/{keys_file(version)}", memoryview(pa.memory_map(str(keys)).read_buffer()))
    write_table(bad, f"{out}/quarantine-{version}.parquet")
    summary = vars(settings) | {
        "format": INDEX_FORMAT,
        "version": version,
        "scale": good["scale"][0].as_py(),
        "pictures": len(good),
        "bytes": pc.sum(good["size"]).as_py(),
        "pixels": pc.sum(pc.multiply(good["width"].cast("int64"), good["height"])).as_py(),
        "quarantined": dict(sorted(reasons.items())),
        "ignored": num_files - len(table),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_bytes(f"{out}/{SUMMARY_FILE}", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _version(identity: pa.Table) -> str:
    """Hash of all rows."""
    digest = hashlib.blake2b(digest_size=8)
    for batch in identity.to_batches(BATCH_ROWS):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _mark_duplicates(table: pa.Table) -> pa.Table:
    """Quarantines all but the first, by key, of usable pictures with the same bytes."""
    rows = np.flatnonzero(pc.equal(table["status"], "ok"))
    codes = table["sha256"].take(pa.array(rows)).combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.empty(codes.max(initial=-1) + 1, np.int64)
    first[codes[::-1]] = rows[::-1]  # the last assignment stays
    is_again = first[codes] != rows
    again = rows[is_again]
    pairs = zip(_at(table["key"], again), _at(table["key"], first[codes][is_again]), strict=True)
    return _quarantine(
        table, again, "duplicate", [f"{key} has the same bytes as {one}." for key, one in pairs]
    )


def _mark_scales(table: pa.Table) -> pa.Table:
    """Quarantines usable pairs whose scale differs from that of the majority."""
    scales = table["scale"].filter(pc.equal(table["status"], "ok"))
    common = pc.mode(scales)
    if not len(common):  # no pairs
        return table
    scale = common[0]["mode"].as_py()
    is_other = pc.and_(pc.equal(table["status"], "ok"), pc.not_equal(table["scale"], scale))
    rows = np.flatnonzero(is_other)
    pairs = zip(_at(table["key"], rows), _at(table["scale"], rows), strict=True)
    details = [f"{key} is a pair of scale {other}; most are of scale {scale}." for key, other in pairs]
    return _quarantine(table, rows, "bad-lq", details)


def _quarantine(table: pa.Table, rows: np.ndarray, status: str, details: list[str]) -> pa.Table:
    """Gives some rows another status, each with its detail."""
    mask = np.zeros(len(table), bool)
    mask[rows] = True
    for name, values in (("status", [status] * len(rows)), ("detail", details)):
        column = table[name].combine_chunks()
        column = pc.replace_with_mask(column, mask, pa.array(values, pa.large_string()))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _at(column: pa.ChunkedArray, rows: np.ndarray) -> list[Any]:
    return column.take(pa.array(rows)).to_pylist()


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
