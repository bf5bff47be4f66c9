"""Splits a listing into chunks and scans a chunk: fetches, hashes and decodes every picture.

A shard is a chunk of its own, whose members are found as it is read.
"""

import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from ctmsr.errors import DataError, PictureError, StoreError
from ctmsr.image import over_white

from ..data import parquet, tars
from ..data.keys import SHARD_COLUMNS, TYPES
from ..infra.listing import Listed, stem
from ..infra.storage import open_uri, read_bytes, write_bytes
from .checks import check_detail, check_shape, inspect, open_picture
from .looks import look_hash

logger = logging.getLogger(__name__)

SCALES = (2, 3, 4)
"""HR/LQ ratios that a network can have."""
SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        **{name: TYPES[name] for name in SHARD_COLUMNS},
        "size": pa.int64(),
        "etag": pa.large_string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "format": pa.large_string(),
        "sha256": pa.large_string(),
        "lq_key": pa.large_string(),
        "lq_sha256": pa.large_string(),
        "scale": pa.int32(),
        "look": pa.uint64(),
        "status": pa.large_string(),
        "detail": pa.large_string(),
    }
)
"""Columns of a part; strings are large because 32-bit offsets end at 2 GiB of text. `status` is "ok" or the
reason for quarantine, `detail` the message. `look` is `look_hash`, only where near-duplicates are sought.
Early parts lack it and `SHARD_COLUMNS`."""
IGNORED = "ignored"
"""Metadata of the part of a shard: how many of its members are no pictures."""

_OF_SHARD = "shard-"
"""How the name of a shard's part begins."""
_CHUNK_KEYS = 256
"""Average number of keys in a chunk."""
_FETCH_THREADS = 8


@dataclass(frozen=True)
class Settings:
    """What the results of a scan depend on, besides the pictures."""

    uri: str
    lq_uri: str
    min_side: int
    max_aspect: float = 0
    """Longest side over shortest; 0 for any."""
    min_detail: float = 0
    """Least part of a picture that is neither flat nor blurred: see `detail`."""
    near_duplicates: int | None = None
    """Bits between the hashes of two pictures that count as one; None to keep all."""

    @property
    def filters(self) -> dict[str, float | bool]:
        """Those settings, besides `min_side`, that the result of a picture's own scan depends on, if set."""
        all_ = {
            "max_aspect": self.max_aspect,
            "min_detail": self.min_detail,
            "look": self.near_duplicates is not None,
        }
        return {name: value for name, value in all_.items() if value}


def chunks(files: Iterable[Listed]) -> Iterator[list[Listed]]:
    """Runs of consecutive files, split at keys chosen by hash, so that a new file affects only one chunk."""
    chunk: list[Listed] = []
    for file in files:
        if file.is_shard:
            yield from ([chunk] if chunk else [])
            yield [file]
            chunk = []
            continue
        chunk.append(file)
        if zlib.crc32(file.key.encode()) % _CHUNK_KEYS == 0 or len(chunk) == 8 * _CHUNK_KEYS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def part_name(chunk: list[Listed], lq: dict[str, Listed], settings: Settings) -> str:
    """Hash of everything a part depends on: an existing part of this name can be reused."""
    files = [(file.key, file.size, file.etag) for file in chunk]
    pairs = [(pair.key, pair.etag) for file in chunk if (pair := lq.get(stem(file.key)))]
    some = [settings.filters] if settings.filters else []  # parts from before there were filters stay valid
    text = json.dumps([files, pairs, settings.uri, settings.lq_uri, settings.min_side, *some])
    kind = _OF_SHARD if chunk[0].is_shard else ""
    return kind + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_of_shard(part: str) -> bool:
    """Whether the part at a path is that of a shard."""
    return part.rpartition("/")[2].startswith(_OF_SHARD)


def scan_chunk(chunk: list[Listed], lq_keys: list[str | None], settings: Settings, part_uri: str) -> int:
    """Scans a chunk and writes its rows to `part_uri`, atomically; returns how many there are.

    Raises:
        DataError: The store fails, which must not be held against the pictures.
    """
    cv2.setNumThreads(1)  # Ray counts a task as one CPU
    if chunk[0].is_shard:
        rows, num_ignored = _shard_rows(chunk[0], settings)
    else:
        num_ignored = 0
        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            rows = list(pool.map(partial(_row, settings=settings), chunk, lq_keys))
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_table(table.replace_schema_metadata({IGNORED: str(num_ignored)}), part_uri)
    return len(rows)


def write_table(table: pa.Table, uri: str) -> None:
    """Writes a table as one Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes(uri, buffer.getvalue())


def _shard_rows(shard: Listed, settings: Settings) -> tuple[list[dict[str, Any]], int]:
    """A row for every picture of a shard, and one if it is damaged; and how many members are others."""
    file_system, root = _open(settings.uri)
    rows: list[dict[str, Any]] = []
    num_ignored, names = 0, set()
    try:
        members = parquet.pictures if shard.key.lower().endswith(parquet.SUFFIX) else tars.pictures
        for member in members(file_system, f"{root}/{shard.key}", shard.size):
            if member is None:
                num_ignored += 1
                continue
            row = {"key": f"{shard.key}/{member.name}", "etag": shard.etag, "shard": len(shard.key)}
            row |= {"offset": member.offset, "length": member.length, "size": len(member.data)}
            is_again = member.name in names
            names.add(member.name)
            rows.append(_checked(row, partial(_contents, member, f"{root}/{row['key']}", is_again), settings))
    except StoreError:
        raise
    except DataError as error:
        reason = error.reason if isinstance(error, PictureError) else "gone"
        row = {"key": shard.key, "size": shard.size, "etag": shard.etag}
        rows.append(row | {"status": reason, "detail": str(error)})
    return rows, num_ignored


def _contents(member: tars.Member, path: str, is_again: bool) -> tuple[bytes, str]:
    if is_again:
        raise PictureError(f"{path} comes twice in its tar; this is the second one.", "duplicate")
    if member.problem:
        raise PictureError(f"{path} {member.problem}", member.reason)
    return member.data, path


def _row(file: Listed, lq_key: str | None, *, settings: Settings) -> dict[str, Any]:
    def contents() -> tuple[bytes, str]:
        if file.problem:
            raise PictureError(file.problem, "unreadable")
        return _read(settings.uri, file.key)

    row = {"key": file.key, "size": file.size, "etag": file.etag}
    return _checked(row, contents, settings, lq_key)


def _checked(
    row: dict[str, Any],
    contents: Callable[[], tuple[bytes, str]],
    settings: Settings,
    lq_key: str | None = None,
) -> dict[str, Any]:
    """A row with what its picture's contents say: whether it is good, or why not."""
    row |= {"status": "ok", "detail": ""}
    try:
        data, path = contents()
        row["sha256"] = hashlib.sha256(data).hexdigest()
        picture = open_picture(data, path)
        row |= inspect(picture)
        check_shape(row, path, settings)
        if settings.min_detail or settings.near_duplicates is not None:
            grey_u8 = cv2.cvtColor(over_white(picture), cv2.COLOR_RGB2GRAY)
            row["look"] = look_hash(grey_u8) if settings.near_duplicates is not None else None
            check_detail(grey_u8, path, settings)
        if settings.lq_uri:
            row |= _pair(row, path, lq_key, settings)
    except PictureError as error:
        row |= {"status": error.reason, "detail": str(error)}
    return row


def _pair(row: dict[str, Any], path: str, lq_key: str | None, settings: Settings) -> dict[str, Any]:
    if lq_key is None:
        raise PictureError(
            f"{path} has no LR picture of the same name under {settings.lq_uri}.", "missing-lq"
        )
    data, lq_path = _read(settings.lq_uri, lq_key)
    try:
        lq = inspect(open_picture(data, lq_path))
    except PictureError as error:
        raise PictureError(str(error), "bad-lq") from error
    for scale in SCALES:
        if (row["width"], row["height"]) == (scale * lq["width"], scale * lq["height"]):
            return {"lq_key": lq_key, "lq_sha256": hashlib.sha256(data).hexdigest(), "scale": scale}
    raise PictureError(
        f"{path} is {row['width']}x{row['height']} pixels and its LR picture {lq_path} "
        f"{lq['width']}x{lq['height']}: not 2, 3 or 4 times smaller.",
        "bad-lq",
    )


def _read(folder: str, key: str) -> tuple[bytes, str]:
    file_system, root = _open(folder)
    path = f"{root}/{key}"
    try:
        return read_bytes(file_system, path), path
    except StoreError:
        raise
    except DataError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise PictureError(f"{path} was deleted while it was being indexed.", "gone") from error
        raise PictureError(str(error), "unreadable") from error


_open = lru_cache(maxsize=4)(open_uri)
