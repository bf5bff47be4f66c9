"""What a run reads of an index, whatever its size."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctmsr.errors import DataError, StoreError
from pipelines.data.keys import BATCH_ROWS, keys_file, write_keys
from pipelines.data.pictures import INDEX_FORMAT, SUMMARY_FILE, find_pictures
from pipelines.data.sample_order import SampleOrder

LENGTH = 1_000
"""Bytes of a key."""


def long_keys(num_keys: int) -> pa.Array:
    """Keys that end in their number, made without a Python string for each."""
    text = np.full((num_keys, LENGTH), ord("k"), np.uint8)
    for place in range(8):
        text[:, LENGTH - 1 - place] = ord("0") + np.arange(num_keys) // 10**place % 10
    offsets = np.arange(num_keys + 1, dtype=np.int64) * LENGTH
    return pa.LargeStringArray.from_buffers(num_keys, pa.py_buffer(offsets), pa.py_buffer(text))


def write_index(folder: Path, columns: dict[str, pa.Array], *, has_keys_file: bool) -> str:
    folder.mkdir()
    table = pa.table(columns)
    summary = {"version": folder.parent.name, "uri": str(folder), "lq_uri": str(folder), "scale": 4}
    (folder / SUMMARY_FILE).write_text(json.dumps(summary | {"pictures": len(table)}))
    pq.write_table(
        table,
        folder / f"index-{folder.parent.name}.parquet",
        compression="zstd",
        use_dictionary=False,
        row_group_size=100_000,
    )
    if has_keys_file:
        write_keys(table.to_batches(BATCH_ROWS), table.column_names, folder / keys_file(folder.parent.name))
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("has_keys_file", [True, False])
def test_keys_of_more_than_two_gibibytes_are_all_there(tmp_path: Path, has_keys_file: bool) -> None:
    keys = long_keys(2_400_000)
    assert keys.nbytes > 2.2 * 2**30
    columns = {"key": keys, "lq_key": keys}
    pictures = find_pictures(write_index(tmp_path / "a.index", columns, has_keys_file=has_keys_file))
    assert len(pictures) == len(keys)
    last = pictures.keys.take(np.array([len(keys) - 1, 2_147_483])).to_pylist()
    assert [row["key"][-7:] for row in last] == ["2399999", "2147483"]
    assert [row["lq_key"][-7:] for row in last] == ["2399999", "2147483"]


def test_an_index_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    uri = write_index(tmp_path / "a.index", {"key": pa.array(["a.png"])}, has_keys_file=True)
    file = Path(uri, SUMMARY_FILE)
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"format": INDEX_FORMAT + 1}))
    with pytest.raises(DataError, match=r"was made by a newer release\. Upgrade"):
        find_pictures(uri)
    file.write_text(json.dumps(summary | {"format": INDEX_FORMAT}))
    assert len(find_pictures(uri)) == 1


@pytest.mark.parametrize("has_keys_file", [True, False])
def test_a_key_is_found_by_its_number(tmp_path: Path, cache: Path, has_keys_file: bool) -> None:
    names = [f"{number:06}.png" for number in range(200_000)]
    keys = pa.array(names, pa.string())  # with 32-bit offsets, as other programs write it
    columns = {"key": keys, "lq_key": keys}
    pictures = find_pictures(write_index(tmp_path / "a.index", columns, has_keys_file=has_keys_file))
    numbers = np.array([199_999, 0, 65_535, 65_536, 99_999, 100_000, 7, 7])
    found = pictures.keys.taker(numbers)()
    assert found["key"].to_pylist() == [names[number] for number in numbers]
    assert found["lq_key"].type == pa.large_string()
    assert any(cache.rglob("*.arrow")) != has_keys_file


def test_a_relative_index_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = pa.array(["a.png"], pa.large_string())
    write_index(tmp_path / "a.index", {"key": keys, "lq_key": keys}, has_keys_file=True)
    monkeypatch.chdir(tmp_path)
    taker = find_pictures("a.index").keys.taker(np.zeros(1, int))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as the tasks are
    assert taker()["key"].to_pylist() == ["a.png"]


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path, cache: Path) -> None:
    keys = pa.array(["a.png"], pa.large_string())
    uri = write_index(tmp_path / "a.index", {"key": keys, "lq_key": keys}, has_keys_file=False)
    cache.write_bytes(b"")  # a file where the folder should be
    with pytest.raises(StoreError, match=r"cannot use .*cache/indexes/keys-"):
        find_pictures(uri).keys.take(np.zeros(1, int))


def test_a_plan_does_not_grow_with_the_index(tmp_path: Path) -> None:
    sizes = []
    for folder, number in ((tmp_path / "a", 10), (tmp_path / "b", 100_000)):
        keys = pa.array([f"{number:06}.png" for number in range(number)], pa.large_string())
        folder.mkdir()
        uri = write_index(folder / "a.index", {"key": keys, "lq_key": keys}, has_keys_file=True)
        order = SampleOrder(find_pictures(uri), 0, 0, 10**9, 32, 4)
        sizes.append(len(pickle.dumps((order, order.get_read_tasks(1)[0].metadata))))
    assert abs(sizes[1] - sizes[0]) < 20  # the number itself
