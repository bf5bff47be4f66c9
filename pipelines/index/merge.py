"""Writes an index from the results of a scan, in memory of some two hundred bytes a picture.

The parts are read twice: first the columns by which pictures are compared with each other, then all of them,
some at a time, to be written.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctmsr.errors import DataError

from ..data.keys import BATCH_ROWS, SHARD_COLUMNS, index_file, keys_file, write_keys
from ..data.pictures import INDEX_FORMAT, SUMMARY_FILE
from ..infra.storage import open_uri, read_bytes, write_bytes
from .compare import COLUMNS, Verdicts, compare
from .scan import IGNORED, SCHEMA, Settings, is_of_shard

_READ_THREADS = 8
_PARTS_AT_ONCE = 64
_PLAIN = r"^[ !#-\[\]-~]*$"
"""Texts that JSON writes as they are."""


def merge(parts: list[str], settings: Settings, out: str, num_others: int) -> dict[str, Any]:
    """Writes the index; returns its summary.

    Args:
        parts: Paths of the results of a scan, in order of key.
        settings: Of the scan.
        out: URI of the index.
        num_others: Files listed that are neither pictures nor shards.

    Raises:
        DataError: No picture is usable, or the store fails.
    """
    verdicts = compare(_tables(parts, out, COLUMNS), settings.near_duplicates)
    num_rows = len(verdicts.why)
    if sum(verdicts.reasons.values()) == num_rows:
        raise DataError(
            f"none of the {num_rows} pictures under {settings.uri} are usable: {verdicts.reasons}."
            f"{_first_detail(parts, out)}"
        )
    shards = [part for part in parts if is_of_shard(part)]
    in_shards = SHARD_COLUMNS if shards else ()
    names = ["key", *(["lq_key"] if settings.lq_uri else []), *in_shards]
    with TemporaryDirectory() as folder:
        index, keys, bad = (Path(folder) / name for name in ("index", "keys", "bad"))
        version, totals = _write_rows(_tables(parts, out), verdicts, names, index, bad)
        write_keys(pq.ParquetFile(index).iter_batches(BATCH_ROWS, columns=names), names, keys)
        for path, name in (
            (index, index_file(version)),
            (keys, keys_file(version)),
            (bad, f"quarantine-{version}.parquet"),
        ):
            write_bytes(f"{out}/{name}", memoryview(pa.memory_map(str(path)).read_buffer()))
    summary = vars(settings) | {
        "format": INDEX_FORMAT if shards else 1,
        "version": version,
        "scale": verdicts.scale or None,
        **totals,
        "quarantined": verdicts.reasons,
        "ignored": num_others + _num_ignored(shards, out),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_bytes(f"{out}/{SUMMARY_FILE}", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _first_detail(parts: list[str], out: str) -> str:
    for table in _tables(parts, out, ["detail"]):
        if len(table):
            return f" {table['detail'][0]}"
    return ""


def _num_ignored(shards: list[str], out: str) -> int:
    """How many members of shards are no pictures, by the parts of the shards."""
    file_system, _ = open_uri(out)

    def read(part: str) -> int:
        return int(pq.read_schema(pa.BufferReader(read_bytes(file_system, part))).metadata[IGNORED.encode()])

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return sum(pool.map(read, shards))


def _tables(parts: list[str], out: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of all parts, in order, some parts at a time."""
    file_system, _ = open_uri(out)
    schema = pa.schema([SCHEMA.field(name) for name in columns or SCHEMA.names])

    def read(part: str) -> pa.Table:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(file_system, part)))
        known = set(file.schema_arrow.names)
        table = file.read([name for name in schema.names if name in known], use_threads=False)
        for name in set(schema.names) - known:  # from before there was such a column
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
        return table.select(schema.names).cast(schema)  # early parts have short strings

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(parts), _PARTS_AT_ONCE):
            some = pool.map(read, parts[start : start + _PARTS_AT_ONCE])
            yield pa.concat_tables(some).combine_chunks()


def _write_rows(
    tables: Iterator[pa.Table], verdicts: Verdicts, names: list[str], index: Path, bad: Path
) -> tuple[str, Counter[str]]:
    """Writes the usable rows and the others; returns the version, and sums over the usable ones."""
    pair = ["lq_key", "lq_sha256"] if "lq_key" in names else []
    in_shards = [name for name in names if name in SHARD_COLUMNS]
    unused = {"status", "detail", "look", *([] if pair else ["lq_key", "lq_sha256", "scale"])}
    absent = set() if in_shards else set(SHARD_COLUMNS)
    schema = pa.schema([one for one in SCHEMA if one.name not in unused | absent])
    bad_schema = pa.schema([one for one in SCHEMA if one.name not in absent])
    digest = hashlib.blake2b(digest_size=8)
    totals: Counter[str] = Counter()
    row = 0
    with (
        pq.ParquetWriter(index, schema, compression="zstd") as good_rows,
        pq.ParquetWriter(bad, bad_schema, compression="zstd") as bad_rows,
    ):
        for table in tables:
            table = _filled(verdicts.apply(table, row), in_shards)
            row += len(table)
            is_good = pc.equal(table["status"], "ok")
            good = table.filter(is_good)
            good_rows.write_table(good.select(schema.names))
            bad_rows.write_table(table.filter(pc.invert(is_good)).select(bad_schema.names))
            digest.update(_json_lines(good.select(["key", "sha256", *pair, *in_shards])))
            totals["pictures"] += len(good)
            totals["bytes"] += pc.sum(good["size"]).as_py() or 0
            totals["pixels"] += pc.sum(pc.multiply(good["width"].cast("int64"), good["height"])).as_py() or 0
            if in_shards:
                totals["in_shards"] += pc.sum(pc.greater(good["shard"], 0)).as_py() or 0
    return digest.hexdigest(), totals


def _filled(table: pa.Table, names: list[str]) -> pa.Table:
    """The table with 0 for null in some columns: those of a shard, for a file of its own."""
    for name in names:
        table = table.set_column(table.schema.get_field_index(name), name, pc.fill_null(table[name], 0))
    return table


def _json_lines(table: pa.Table) -> bytes:
    """Each row as a JSON list, one after the other: what the version of an index is a hash of."""
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    is_text = all(pa.types.is_large_string(column.type) for column in table.columns)
    if is_text and all(pc.all(pc.match_substring_regex(column, _PLAIN)).as_py() for column in table.columns):
        return "".join(['["' + '", "'.join(row) + '"]' for row in rows]).encode()  # in a fifth of the time
    return "".join([json.dumps(row) for row in rows]).encode()
