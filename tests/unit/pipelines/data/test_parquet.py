"""Parquet files of pictures: which column is read, what is set aside, and what happens if a file changes."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from ctmsr.errors import DataError, PictureError
from ctmsr.image import encode_png
from pipelines.data import parquet
from tests.support.keys import keys_of
from tests.support.shards import indexed, parquet_of, quarantine, read_all, summary

PHOTOS = {
    f"{number}.png": encode_png(np.random.default_rng(number).integers(0, 256, (34, 40, 3), np.uint8))
    for number in range(11)
}
KEYS = [f"a.parquet/{row:08}" for row in range(len(PHOTOS))]


def test_rows_are_read_from_their_row_groups(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_of(PHOTOS))
    pictures = indexed(str(tmp_path), tmp_path.parent / "rows")
    assert (keys_of(pictures), pictures.has_shards) == (KEYS, True)
    found = read_all(pictures)
    assert found == {
        key: [(f"{tmp_path}/{key}", data)] for key, data in zip(KEYS, PHOTOS.values(), strict=True)
    }


def test_what_is_no_picture_is_set_aside_and_other_files_are_counted(tmp_path: Path) -> None:
    photos = list(PHOTOS.values())
    rows = {"a": photos[0], "null": None, "text": b"no picture", "again": photos[0], "b": photos[1]}
    (tmp_path / "a.parquet").write_bytes(parquet_of(rows))
    plain = pa.table({"jpg": pa.array(photos[2:4], pa.large_binary()), "key": ["x", "y"]})
    pq.write_table(plain, tmp_path / "b.parquet")
    pq.write_table(pa.table({"key": ["x", "y"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"hr": photos[:1], "lr": photos[1:2]}), tmp_path / "d.parquet")
    pictures = indexed(str(tmp_path), tmp_path.parent / "aside")
    assert keys_of(pictures) == [
        *(f"a.parquet/{n:08}" for n in (0, 4)),
        *(f"b.parquet/{n:08}" for n in (0, 1)),
    ]
    found = quarantine(pictures)
    assert {key: status for key, (status, _) in found.items()} == {
        "a.parquet/00000001": "unreadable",
        "a.parquet/00000002": "unreadable",
        "a.parquet/00000003": "duplicate",
        "d.parquet": "unreadable",
    }
    assert "00000001 has no bytes. Embed the files" in found["a.parquet/00000001"][1]
    assert "has several columns of bytes: hr, lr. Name the pictures' 'image'." in found["d.parquet"][1]
    assert summary(pictures)["ignored"] == 1


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 0.999), flip=st.floats(0, 1), is_cut=st.booleans())
def test_damage_is_told(
    tmp_path_factory: pytest.TempPathFactory, cut: float, flip: float, is_cut: bool
) -> None:
    data = bytearray(parquet_of(PHOTOS))
    if is_cut:
        data = data[: int(cut * len(data))]
    else:
        data[int(flip * (len(data) - 1))] ^= 0xFF
    path = tmp_path_factory.mktemp("damaged") / "a.parquet"
    path.write_bytes(data)
    found: list[bytes] = []
    problems = []
    try:
        for member in parquet.pictures(fs.LocalFileSystem(), str(path), len(data)):
            if member is not None:
                found.append(member.data)
    except PictureError as error:
        problems.append(str(error))
    if is_cut:
        assert problems
        assert "is not a whole Parquet file" in problems[0]
    else:  # one picture may have another byte: it is hashed and decoded
        assert problems or sum(a != b for a, b in zip(found, PHOTOS.values(), strict=True)) <= 1 or not found


def test_a_file_that_has_changed_is_a_problem_of_its_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of(PHOTOS))
    pictures = indexed(str(tmp_path), tmp_path.parent / "changed")
    path.write_bytes(parquet_of(dict(list(PHOTOS.items())[:5])))
    found = read_all(pictures)
    gone = f"is not where it was: {path} has changed. Index the pictures again."
    assert [found[key] for key in KEYS[5:]] == [f"{tmp_path}/{key} {gone}" for key in KEYS[5:]]
    assert all(isinstance(found[key], list) for key in KEYS[:5])
    path.write_bytes(path.read_bytes()[:-20])
    assert all(
        f"{path} is not a whole Parquet file" in str(problem) for problem in read_all(pictures).values()
    )
    path.unlink()
    assert set(read_all(pictures).values()) == {f"{path} does not exist. Check the path."}


def test_a_file_without_pictures_is_no_data_set(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": ["x"]}), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"none of the 0 pictures under .* are usable"):
        indexed(str(tmp_path), tmp_path.parent / "none")
