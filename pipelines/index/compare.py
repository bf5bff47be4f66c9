"""Compares the pictures of a scan: which have the same bytes, another scale, or similar looks."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .near import keepers

COLUMNS = ["key", "status", "sha256", "scale", "width", "height", "look"]
"""What has to be known of every picture at the same time."""
_SCANNED, _DUPLICATE, _OTHER_SCALE, _NEAR = range(4)
_STATUS = {_DUPLICATE: "duplicate", _OTHER_SCALE: "bad-lq", _NEAR: "near-duplicate"}


@dataclass
class Verdicts:
    """Which pictures the comparison sets aside, by number of the row."""

    keys: pa.ChunkedArray
    instead: np.ndarray
    """int64: the row of the picture that is kept; a row's own if it is not a duplicate."""
    scales: np.ndarray
    """int32: of pairs; 0 for what is no pair."""
    why: np.ndarray
    """int8: a reason for each row, `_SCANNED` where the scan's own status stays."""
    scale: int = 0
    """That of most pairs."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Number of rows set aside, by status, including those of the scan."""

    def apply(self, table: pa.Table, start: int) -> pa.Table:
        """The rows from number `start` on, with their final status and detail."""
        why = self.why[start : start + len(table)]
        changed = np.flatnonzero(why)
        keys = table["key"].take(pa.array(changed)).to_pylist()
        kept = self.keys.take(pa.array(self.instead[start + changed])).to_pylist()
        scales = self.scales[start + changed].tolist()
        details = [self._detail(*one) for one in zip(why[changed].tolist(), keys, kept, scales, strict=True)]
        status = [_STATUS[code] for code in why[changed].tolist()]
        mask = pa.array(why != _SCANNED)
        for name, values in (("status", status), ("detail", details)):
            column = table[name].combine_chunks()
            column = pc.replace_with_mask(column, mask, pa.array(values, pa.large_string()))
            table = table.set_column(table.schema.get_field_index(name), name, column)
        return table

    def _detail(self, why: int, key: str, kept: str, scale: int) -> str:
        if why == _OTHER_SCALE:
            return f"{key} is a pair of scale {scale}; most are of scale {self.scale}."
        return f"{key} {'has the same bytes as' if why == _DUPLICATE else 'looks like'} {kept}."


def compare(tables: Iterable[pa.Table], near_duplicates: int | None) -> Verdicts:
    """Compares the rows of some tables of `COLUMNS`, in order of key.

    Args:
        tables: Rows of a scan.
        near_duplicates: As in `Settings`.
    """
    counts: Counter[str] = Counter()
    keys, columns, looks = [], [], []
    for table in tables:
        counts.update({one["values"]: one["counts"] for one in pc.value_counts(table["status"]).to_pylist()})
        keys += table["key"].chunks
        columns.append(_numbers(table))
        if near_duplicates is not None:
            looks.append(_looks(table))
    usable, digests, scales = _joined(columns)
    why = np.zeros(len(usable), np.int8)
    verdicts = Verdicts(pa.chunked_array(keys, pa.large_string()), np.arange(len(usable)), scales, why)

    rows = np.flatnonzero(usable)
    rows = _keep(verdicts, rows, rows[_first_of_same(digests[rows])], _DUPLICATE)
    if scales[rows].any():
        verdicts.scale = int(np.bincount(scales[rows]).argmax())
        is_other = scales[rows] != verdicts.scale
        why[rows[is_other]] = _OTHER_SCALE
        rows = rows[~is_other]
    if near_duplicates is not None:
        areas, hashes = _joined(looks)
        rows = rows[np.argsort(-areas[rows], kind="stable")]  # the largest first, the first key among equals
        _keep(verdicts, rows, rows[keepers(hashes[rows], near_duplicates)], _NEAR)
    counts.update({status: int(np.count_nonzero(why == code)) for code, status in _STATUS.items()})
    verdicts.reasons = {
        status: number for status, number in sorted(counts.items()) if number and status != "ok"
    }
    return verdicts


def _numbers(table: pa.Table) -> tuple[np.ndarray, ...]:
    """Whether a row is usable, two uint64 of its hash, and its scale."""
    hexadecimal = "".join(table["sha256"].fill_null("0" * 64).to_pylist())
    words = np.frombuffer(bytes.fromhex(hexadecimal), "<u8").reshape(-1, 4)
    return (
        pc.equal(table["status"], "ok").to_numpy(),
        words[:, :2] ^ words[:, 2:],  # 128 bits tell files apart
        table["scale"].fill_null(0).to_numpy(),
    )


def _looks(table: pa.Table) -> tuple[np.ndarray, ...]:
    """The pixels of a row, and the hash of its looks."""
    area = pc.multiply(table["width"].cast("int64"), table["height"].cast("int64"))
    return area.fill_null(0).to_numpy(), table["look"].fill_null(0).to_numpy()


def _joined(parts: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Whole columns; empties the list, as columns and parts need not be in memory together."""
    found = [np.concatenate(column) for column in zip(*parts, strict=True)]
    parts.clear()
    return found


def _keep(verdicts: Verdicts, rows: np.ndarray, keeper: np.ndarray, why: int) -> np.ndarray:
    """Sets aside the rows that have another keeper than themselves; returns the rest."""
    is_kept = keeper == rows
    verdicts.why[rows[~is_kept]] = why
    verdicts.instead[rows[~is_kept]] = keeper[~is_kept]
    return rows[is_kept]


def _first_of_same(digests: np.ndarray) -> np.ndarray:
    """For each row of (n, 2) the first equal one, int64 of shape (n,)."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first
