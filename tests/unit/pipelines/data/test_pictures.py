"""What a run reads of an index, whatever its size."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.pictures import SUMMARY_FILE, find_pictures

LENGTH = 1_000
"""Bytes of a key."""


def long_keys(num_keys: int) -> pa.Array:
    """Keys that end in their number, made without a Python string for each."""
    text = np.full((num_keys, LENGTH), ord("k"), np.uint8)
    for place in range(8):
        text[:, LENGTH - 1 - place] = ord("0") + np.arange(num_keys) // 10**place % 10
    offsets = np.arange(num_keys + 1, dtype=np.int64) * LENGTH
    return pa.LargeStringArray.from_buffers(num_keys, pa.py_buffer(offsets), pa.py_buffer(text))


def write_index(folder: Path, columns: dict[str, pa.Array]) -> str:
    folder.mkdir()
    summary = {"version": "v", "uri": str(folder), "lq_uri": str(folder), "scale": 4}
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))
    pq.write_table(pa.table(columns), folder / "index-v.parquet", compression="zstd", use_dictionary=False)
    return str(folder)


@pytest.mark.slow
def test_keys_of_more_than_two_gibibytes_are_all_there(tmp_path: Path) -> None:
    keys = long_keys(2_400_000)
    assert keys.nbytes > 2.2 * 2**30
    pictures = find_pictures(write_index(tmp_path / "photos.index", {"key": keys, "lq_key": keys}))
    for found in (pictures.keys, pictures.lq_keys):
        assert found is not None
        assert len(found) == len(keys)
        assert found[len(keys) - 1].as_py().endswith("2399999")


def test_an_index_whose_text_has_32_bit_offsets_is_read(tmp_path: Path) -> None:
    keys = pa.array(["a.png", "b.png"], pa.string())
    pictures = find_pictures(write_index(tmp_path / "photos.index", {"key": keys, "lq_key": keys}))
    assert pictures.keys.to_pylist() == ["a.png", "b.png"]
    assert pictures.keys.type == pa.large_string()
