"""A listing in chunks, and a chunk to rows of the index: every picture fetched, hashed and decoded."""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ctmsr.errors import DataError, PictureError
from ctmsr.image import FORMATS, decode

from ..infra.listing import Listed
from ..infra.storage import open_uri, read_bytes, write_bytes

SCALES = (2, 3, 4)
"""HR/LQ ratios that a network may have."""
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
        "status": pa.large_string(),
        "detail": pa.large_string(),
    }
)
"""Of a part; large, because 32-bit offsets end at 2 GiB of text. `status` is "ok" or the reason of the
quarantine, `detail` its message."""

_CHUNK_KEYS = 256
"""Keys of a chunk, on average."""
_FETCH_THREADS = 8


@dataclass(frozen=True)
class Settings:
    """What the rows of a scan depend on, besides the pictures."""

    uri: str
    lq_uri: str
    min_side: int


def chunks(files: Iterable[Listed]) -> Iterator[list[Listed]]:
    """Consecutive files, cut where the hash of a key says so: a new file changes one chunk, no later one."""
    chunk: list[Listed] = []
    for file in files:
        chunk.append(file)
        if zlib.crc32(file.key.encode()) % _CHUNK_KEYS == 0 or len(chunk) == 8 * _CHUNK_KEYS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def part_name(chunk: list[Listed], lq: dict[str, Listed], settings: Settings) -> str:
    """Hash of all that a part's rows depend on: a part of this name need not be made again."""
    files = [(file.key, file.size, file.etag) for file in chunk]
    pairs = [(pair.key, pair.etag) for file in chunk if (pair := lq.get(stem(file.key)))]
    text = json.dumps([files, pairs, settings.uri, settings.lq_uri, settings.min_side])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stem(key: str) -> str:
    """What the two pictures of a pair have in common: the key without its suffix."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def scan_chunk(chunk: list[Listed], lq_keys: list[str | None], settings: Settings, part_uri: str) -> None:
    """Writes the rows of a chunk to `part_uri`, whole or not at all.

    Raises:
        DataError: The store fails. That must not count as a defect of pictures.
    """
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        rows = list(pool.map(partial(_row, settings=settings), chunk, lq_keys))
    write_table(pa.Table.from_pylist(rows, SCHEMA), part_uri)


def write_table(table: pa.Table, uri: str) -> None:
    """A table as one Parquet file."""
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
        data, path = _read(settings.uri, file.key)
        row["sha256"] = hashlib.sha256(data).hexdigest()
        row |= _look(data, path)
        if min(row["width"], row["height"]) < settings.min_side:
            size = f"{row['width']}x{row['height']}"
            raise PictureError(f"{path} is {size} pixels, below {settings.min_side} on a side.", "too-small")
        if settings.lq_uri:
            row |= _pair(row, path, lq_key, settings)
    except PictureError as error:
        row |= {"status": error.reason, "detail": str(error)}
    return row


def _look(data: bytes, path: str) -> dict[str, Any]:
    """Width and height as training sees them, and the format of the header, whatever the name says."""
    height, width, _ = decode(data, name=path).shape
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return {"width": width, "height": height, "format": image.format}


def _pair(row: dict[str, Any], path: str, lq_key: str | None, settings: Settings) -> dict[str, Any]:
    if lq_key is None:
        raise PictureError(f"{path} has no LR picture of its name under {settings.lq_uri}.", "missing-lq")
    data, lq_path = _read(settings.lq_uri, lq_key)
    try:
        look = _look(data, lq_path)
    except PictureError as error:
        raise PictureError(str(error), "bad-lq") from error
    for scale in SCALES:
        if (row["width"], row["height"]) == (scale * look["width"], scale * look["height"]):
            return {"lq_key": lq_key, "lq_sha256": hashlib.sha256(data).hexdigest(), "scale": scale}
    raise PictureError(
        f"{path} is {row['width']}x{row['height']} pixels and its LR picture {lq_path} "
        f"{look['width']}x{look['height']}: neither 2, 3 nor 4 times less.",
        "bad-lq",
    )


def _read(folder: str, key: str) -> tuple[bytes, str]:
    file_system, root = _open(folder)
    path = f"{root}/{key}"
    try:
        return read_bytes(file_system, path), path
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise PictureError(f"{path} was deleted while it was being indexed.", "gone") from error


_open = lru_cache(maxsize=4)(open_uri)
