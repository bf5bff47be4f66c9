"""Packs the usable pictures of an index into tars, to be read by ranges instead of one request a picture.

A tar holds a fixed number of pictures in a fixed order, so that the same index always gives the same tars,
and a packing that was interrupted goes on with those that are missing. Files are put in random order, so that
neighbours, which training in sharded order sees together, have nothing to do with each other. Pictures that
are in shards already keep their order.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctmsr.errors import DataError
from ctmsr.rng import permuted

from ..data.keys import IndexKeys, index_file
from ..data.pictures import INDEX_SUFFIX, Pictures, find_pictures
from ..data.reading import Places, Wanted, read_pictures
from ..infra.listing import is_image
from ..infra.progress import Bar, Screen
from ..infra.ray_data import map_rows
from ..infra.storage import list_sizes, open_uri, read_bytes, storage_errors, write_bytes
from .run import build_index
from .scan import Settings

PLAN_FILE = "pack.json"
_STOPPED = "the packing stopped; run the same command again to resume it."
_ROUND_SHARDS = 64
"""Tars to plan at a time."""
_ORDER_SEED = 0

Row = dict[str, Any]
"""Of an index: "key", "sha256", "format" and, with shards, `SHARD_COLUMNS`."""


def pack(index_uri: str, out: str, *, shard_bytes: int, min_side: int) -> dict[str, Any]:
    """Writes the tars that are missing, then the index of all of them; returns its summary.

    Args:
        index_uri: Of the pictures.
        out: Folder for the tars; their index is beside it.
        shard_bytes: Approximate size of a tar.
        min_side: For the index of the tars: that of the pictures' own.

    Raises:
        DataError: A picture has changed since it was indexed, `out` holds other tars, or the store fails.
    """
    pictures = find_pictures(index_uri)
    table = _index_table(pictures)
    per_shard = max(1, round(shard_bytes / (np.mean(table["size"]) + 2 * tarfile.BLOCKSIZE)))
    _claim(out, {"version": pictures.version, "pictures": len(pictures), "per_shard": per_shard})
    names = [f"{number:06}.tar" for number in range(-(-len(pictures) // per_shard))]
    _write_shards(pictures, table, out, names, per_shard)
    packed = build_index(Settings(out, "", min_side), out + INDEX_SUFFIX)
    _compare(table, find_pictures(out + INDEX_SUFFIX))
    return packed


def _index_table(pictures: Pictures) -> pa.Table:
    """What packing needs of an index."""
    assert isinstance(pictures.keys, IndexKeys)
    names = [*pictures.keys.names, "size", "sha256", "format"]
    file_system, root = open_uri(pictures.uri)
    path = f"{root}/{index_file(pictures.version)}"
    with storage_errors(path), file_system.open_input_file(path) as file:
        return pq.read_table(file, columns=names)


def _claim(out: str, plan: Mapping[str, Any]) -> None:
    """Writes what the tars of a folder are made from, unless it is there and says the same."""
    uri = f"{out}{INDEX_SUFFIX}/{PLAN_FILE}"
    file_system, path = open_uri(uri)
    try:
        found = json.loads(read_bytes(file_system, path))
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        if list_sizes(out):
            raise DataError(f"--pack {out} has files already. Name a new folder.") from error
        write_bytes(uri, json.dumps(plan).encode())
        return
    if found != plan:
        raise DataError(
            f"--pack {out} holds tars of another set of pictures, or of another size: {found}, but now it "
            f"would be {plan}. Name a new folder, or delete this one and {out}{INDEX_SUFFIX}."
        )


def _write_shards(
    pictures: Pictures, table: pa.Table, out: str, names: Sequence[str], per_shard: int
) -> None:
    existing = {str(path) for path in list_sizes(out)}
    todo = iter([number for number, name in enumerate(names) if name not in existing])
    num_done = len(existing.intersection(names))

    def planned(number: int) -> Row:
        positions = np.arange(number * per_shard, min((number + 1) * per_shard, len(table)))
        if not pictures.has_shards:
            positions = permuted(_ORDER_SEED, np.zeros_like(positions), len(table), positions)
        rows = table.take(pa.array(positions)).drop_columns("size").to_pylist()
        return {"rows": rows, "uri": f"{out}/{names[number]}"}

    def written(task: Row) -> Row:
        return {"bytes": write_shard(task["rows"], pictures.places, task["uri"])}

    with Screen() as screen:
        while some := [planned(number) for number in islice(todo, _ROUND_SHARDS)]:
            for _ in map_rows(some, written, _STOPPED):
                num_done += 1
                screen.show(Bar(f"packed {num_done} of {len(names)} tars", num_done, len(names)))


def write_shard(rows: Sequence[Row], places: Places, uri: str) -> int:
    """Writes a tar of pictures once it is known to hold what the index says; returns its size in bytes."""
    names = [name for name in Wanted.__dataclass_fields__ if name in rows[0]]
    pictures = [Wanted(**{name: row[name] for name in names}) for row in rows]
    found = {picture.key: files for picture, files in read_pictures(pictures, places)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            files = found.pop(row["key"])
            if isinstance(files, str):
                raise DataError(f"{files} Index the pictures again, then pack them.")
            info = tarfile.TarInfo(_member_name(row))  # of no owner and no time
            info.size = len(files[0][1])
            tar.addfile(info, io.BytesIO(files[0][1]))
    _verify(buffer, rows, places)
    write_bytes(uri, buffer.getbuffer())
    return buffer.getbuffer().nbytes


def _member_name(row: Row) -> str:
    """The key, with a suffix if it has none: a row of a Parquet file."""
    return row["key"] if is_image(row["key"]) else f"{row['key']}.{row['format'].lower()}"


def _verify(buffer: io.BytesIO, rows: Sequence[Row], places: Places) -> None:
    """Compares every member with the hash that the index has of it."""
    buffer.seek(0)
    with tarfile.open(fileobj=buffer, mode="r:") as tar:
        for row, info in zip(rows, tar, strict=True):
            file = tar.extractfile(info)
            assert file is not None  # all members are regular files
            if hashlib.sha256(file.read()).hexdigest() != row["sha256"]:
                raise DataError(
                    f"{places.folder}/{row['key']} has changed since it was indexed. Index the pictures "
                    "again, then pack them."
                )


def _compare(table: pa.Table, packed: Pictures) -> None:
    """Checks that the index of the tars has exactly the pictures of the first."""
    hashes = [one["sha256"].combine_chunks().sort() for one in (table, _index_table(packed))]
    if not hashes[0].equals(hashes[1]):
        raise DataError(
            f"{packed.uri} has {len(hashes[1])} of {len(hashes[0])} pictures and says which tar is damaged. "
            "Delete that tar, then run the same command again."
        )
