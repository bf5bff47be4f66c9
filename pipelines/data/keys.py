"""The keys of a set of pictures, by number: in memory for a folder, looked up where needed for an index.

A plan of samples holds numbers only. The tasks that read the pictures look up the keys of an index
themselves, in a file that is mapped into memory, so that planner and trainer do not grow with the index.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from pyarrow import fs

from ctmsr.metrics.backbone_cache import cache_folder

from ..infra.storage import open_uri, storage_errors

BATCH_ROWS = 65_536
"""Rows of a record batch in a file of keys; a batch is the least that is looked at to find a key."""


SHARD_COLUMNS = ("shard", "offset", "length")
"""Where a picture is in its shard: see `Wanted`."""
TYPES = {
    "key": pa.large_string(),
    "lq_key": pa.large_string(),
    "shard": pa.int32(),
    "offset": pa.int64(),
    "length": pa.int64(),
}
"""Types of the columns of keys."""


class Keys(Protocol):
    """Tables of "key", "lq_key" for pairs and `SHARD_COLUMNS` for shards, by the number of the picture."""

    def __len__(self) -> int: ...

    def take(self, numbers: np.ndarray) -> pa.Table:
        """The rows of some pictures, in the order of `numbers`."""

    def taker(self, numbers: np.ndarray) -> Callable[[], pa.Table]:
        """`take`, to be called in another process."""


@dataclass(frozen=True)
class ListedKeys:
    """The keys of a folder, which has just been listed."""

    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    def take(self, numbers: np.ndarray) -> pa.Table:
        return self.table.take(pa.array(numbers))

    def taker(self, numbers: np.ndarray) -> Callable[[], pa.Table]:
        found = self.take(numbers)  # the other process gets these rows, not the list
        return lambda: found


@dataclass(frozen=True)
class IndexKeys:
    """The keys of an index, in a file of its own that each node maps into memory."""

    uri: str
    """The folder of the index, absolute."""
    version: str
    names: tuple[str, ...]
    """Columns: some of `TYPES`."""
    num_keys: int

    def __len__(self) -> int:
        return self.num_keys

    def take(self, numbers: np.ndarray) -> pa.Table:
        file, starts = _mapped(self.uri, self.version, self.names)
        batches = np.searchsorted(starts, numbers, side="right") - 1
        rows = numbers - starts[batches]
        opened = {batch: file.get_batch(batch) for batch in np.unique(batches).tolist()}
        found = [
            opened[batch].slice(row, 1) for batch, row in zip(batches.tolist(), rows.tolist(), strict=True)
        ]
        return pa.Table.from_batches(found, file.schema).combine_chunks()

    def taker(self, numbers: np.ndarray) -> Callable[[], pa.Table]:
        return partial(self.take, numbers)


def keys_file(version: str) -> str:
    """Name of the file of keys in an index's folder."""
    return f"keys-{version}.arrow"


def index_file(version: str) -> str:
    """Name of the table of an index in its folder."""
    return f"index-{version}.parquet"


def write_keys(batches: Iterable[pa.RecordBatch], names: Iterable[str], path: Path) -> None:
    """Writes a file of keys: an Arrow file, uncompressed so that it can be mapped.

    Args:
        batches: Rows of an index, with at least the columns `names`.
        names: The columns to write.
        path: The new file.
    """
    schema = pa.schema([(name, TYPES[name]) for name in names])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for batch in batches:
            file.write_batch(
                pa.record_batch([batch[name].cast(TYPES[name]) for name in schema.names], schema)
            )


@lru_cache(maxsize=4)
def _mapped(uri: str, version: str, names: tuple[str, ...]) -> tuple[pa.RecordBatchFileReader, np.ndarray]:
    """The file of keys, and the number of the first row of each of its batches."""
    path = _local_file(uri, version, names)
    with storage_errors(str(path)):
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        sizes = [file.get_batch(batch).num_rows for batch in range(file.num_record_batches)]
    return file, np.cumsum([0, *sizes[:-1]])


def _local_file(uri: str, version: str, names: tuple[str, ...]) -> Path:
    """An index's file of keys: where it is, if that is on this machine, else a copy in the cache.

    Early indexes have none; the copy is made from their table.
    """
    file_system, root = open_uri(uri)
    source = f"{root}/{keys_file(version)}"
    if isinstance(file_system, fs.LocalFileSystem) and Path(source).is_file():
        return Path(source)
    cached = cache_folder() / "indexes" / keys_file(version)
    with storage_errors(str(cached)):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            if not cached.is_file():
                _fetch(file_system, root, version, names, cached)
    return cached


def _fetch(file_system: fs.FileSystem, root: str, version: str, names: tuple[str, ...], dest: Path) -> None:
    source = f"{root}/{keys_file(version)}"
    with tempfile.TemporaryDirectory(dir=dest.parent) as folder, storage_errors(source):
        part = Path(folder) / "part"
        if file_system.get_file_info(source).type == fs.FileType.File:
            fs.copy_files(source, str(part), file_system, fs.LocalFileSystem())
        else:
            with file_system.open_input_file(f"{root}/{index_file(version)}") as file:
                write_keys(pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(names)), names, part)
        part.replace(dest)
