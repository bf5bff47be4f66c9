"""Splits a listing into chunks and scans a chunk: fetches, hashes and decodes every picture."""

import hashlib
import io
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctmsr.errors import DataError, PictureError, StoreError
from ctmsr.image import Picture, over_white, read

from ..infra.listing import Listed, stem
from ..infra.storage import open_uri, read_bytes, write_bytes
from .looks import detail, look_hash

logger = logging.getLogger(__name__)

SCALES = (2, 3, 4)
"""HR/LQ ratios that a network can have."""
SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
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
reason for quarantine, `detail` the message. `look` is `look_hash`, only where near-duplicates are sought."""

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
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def scan_chunk(chunk: list[Listed], lq_keys: list[str | None], settings: Settings, part_uri: str) -> None:
    """Scans a chunk and writes its rows to `part_uri`, atomically.

    Raises:
        DataError: The store fails, which must not be held against the pictures.
    """
    cv2.setNumThreads(1)  # Ray counts a task as one CPU
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        rows = list(pool.map(partial(_row, settings=settings), chunk, lq_keys))
    write_table(pa.Table.from_pylist(rows, SCHEMA), part_uri)


def write_table(table: pa.Table, uri: str) -> None:
    """Writes a table as one Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes(uri, buffer.getvalue())


def _row(file: Listed, lq_key: str | None, *, settings: Settings) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": file.key,
        "size": file.size,
        "etag": file.etag,
        "status": "ok",
        "detail": "",
    }
    try:
        if file.problem:
            raise PictureError(file.problem, "unreadable")
        data, path = _read(settings.uri, file.key)
        row["sha256"] = hashlib.sha256(data).hexdigest()
        picture = _open_picture(data, path)
        row |= _inspect(picture)
        _check_shape(row, path, settings)
        if settings.min_detail or settings.near_duplicates is not None:
            grey_u8 = cv2.cvtColor(over_white(picture), cv2.COLOR_RGB2GRAY)
            row["look"] = look_hash(grey_u8) if settings.near_duplicates is not None else None
            _check_detail(grey_u8, path, settings)
        if settings.lq_uri:
            row |= _pair(row, path, lq_key, settings)
    except PictureError as error:
        row |= {"status": error.reason, "detail": str(error)}
    return row


def _open_picture(data: bytes, path: str) -> Picture:
    picture = read(data, name=path)
    for warning in picture.warnings:
        logger.warning("%s", warning)
    return picture


def _inspect(picture: Picture) -> dict[str, Any]:
    """Width and height as training sees them, and the format by the file's header, not its name."""
    height, width = picture.pixels.shape[:2]
    return {"width": width, "height": height, "format": picture.format}


def _check_shape(row: dict[str, Any], path: str, settings: Settings) -> None:
    short, long = sorted((row["width"], row["height"]))
    size = f"{path} is {row['width']}x{row['height']} pixels"
    if short < settings.min_side:
        raise PictureError(f"{size}; both sides must be at least {settings.min_side}.", "too-small")
    if settings.max_aspect and long > settings.max_aspect * short:
        raise PictureError(
            f"{size}; one side may be at most {settings.max_aspect:g} times the other.", "too-narrow"
        )


def _check_detail(grey_u8: np.ndarray, path: str, settings: Settings) -> None:
    if settings.min_detail and (found := detail(grey_u8)) < settings.min_detail:
        raise PictureError(
            f"{path} is flat or blurred, except for {found:.3f} of its area; at least "
            f"{settings.min_detail:g} must have detail.",
            "no-detail",
        )


def _pair(row: dict[str, Any], path: str, lq_key: str | None, settings: Settings) -> dict[str, Any]:
    if lq_key is None:
        raise PictureError(
            f"{path} has no LR picture of the same name under {settings.lq_uri}.", "missing-lq"
        )
    data, lq_path = _read(settings.lq_uri, lq_key)
    try:
        lq = _inspect(_open_picture(data, lq_path))
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
