"""Tars of pictures: what is found in them, what is refused, and what happens if they change."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from ctmsr.errors import DataError, PictureError
from ctmsr.image import encode_png
from pipelines.data import tars
from pipelines.data.pictures import find_pictures
from pipelines.data.reading import Wanted, spans
from tests.support.keys import keys_of
from tests.support.shards import indexed, quarantine, read_all, summary, tar_of

PHOTOS = {
    name: encode_png(np.random.default_rng(number).integers(0, 256, (34, 40 + number, 3), np.uint8))
    for number, name in enumerate(
        ("a.png", "b/c.PNG", "./d.png", "\u5199\u771f.png", "x" * 150 + ".png", "d/" * 80 + "e.png", "f.png")
    )
}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_by_their_bytes_whatever_their_names(tmp_path: Path, kind: int) -> None:
    files = {"f.json": b"{}", **PHOTOS, "f.txt": b"a caption", "notes": b""}
    for number in range(2):
        some = dict(list(files.items())[number::2])
        (tmp_path / f"{number}.tar").write_bytes(tar_of(some, kind))
    pictures = indexed(str(tmp_path), tmp_path.parent / f"{kind}")
    keys = {f"{number}.tar/{name}" for number in range(2) for name in list(files)[number::2]}
    assert set(keys_of(pictures)) == {key for key in keys if key.lower().endswith(".png")}
    assert (pictures.has_shards, summary(pictures)["ignored"]) == (True, 3)
    for key, found in read_all(pictures).items():
        assert found == [(f"{tmp_path}/{key}", PHOTOS[key.partition("/")[2]])]


def test_members_are_checked_as_files_are(tmp_path: Path) -> None:
    good = PHOTOS["a.png"]
    small = encode_png(np.zeros((8, 40, 3), np.uint8))
    (tmp_path / "one.png").write_bytes(good)
    members = {"bad.jpg": b"no picture", "small.png": small, "same.png": good, "b.png": PHOTOS["f.png"]}
    (tmp_path / "two.tar").write_bytes(tar_of(members))
    pictures = indexed(str(tmp_path), tmp_path.parent / "checked")
    assert keys_of(pictures) == ["one.png", "two.tar/b.png"]
    found = quarantine(pictures)
    assert {key: status for key, (status, _) in found.items()} == {
        "two.tar/bad.jpg": "unreadable",
        "two.tar/same.png": "duplicate",
        "two.tar/small.png": "too-small",
    }
    assert read_all(pictures)["one.png"] == [(f"{tmp_path}/one.png", good)]
    assert not pictures.has_shards  # not all of them are


def test_a_name_that_comes_twice_counts_once(tmp_path: Path) -> None:
    one, two = tar_of({"a.png": PHOTOS["a.png"]}), tar_of({"a.png": PHOTOS["f.png"]})
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, data in enumerate((PHOTOS["a.png"], PHOTOS["f.png"])):
            (tmp_path / f"{number}.bin").write_bytes(data)
            tar.add(tmp_path / f"{number}.bin", "a.png")
    pictures = indexed(str(tmp_path), tmp_path.parent / "twice")
    assert read_all(pictures) == {"x.tar/a.png": [(f"{tmp_path}/x.tar/a.png", PHOTOS["a.png"])]}
    assert quarantine(pictures)["x.tar/a.png"][0] == "duplicate"
    (tmp_path / "x.tar").write_bytes(one + two)
    pictures = indexed(str(tmp_path), tmp_path.parent / "appended")
    assert "another tar is appended, at byte" in quarantine(pictures)["x.tar"][1]


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), flip=st.floats(0, 1), is_cut=st.booleans())
def test_damage_is_told_and_never_gives_another_picture(
    tmp_path_factory: pytest.TempPathFactory, cut: float, flip: float, is_cut: bool
) -> None:
    whole = tar_of(PHOTOS)
    data = bytearray(whole)
    if is_cut:
        data = data[: int(cut * whole.rindex(PHOTOS["f.png"]))]
    else:
        data[int(flip * (len(data) - 1))] ^= 0xFF
    path = tmp_path_factory.mktemp("damaged") / "a.tar"
    path.write_bytes(data)
    problems, found = [], {}
    try:
        for member in tars.pictures(fs.LocalFileSystem(), str(path), len(data)):
            assert member is not None
            if member.problem:
                problems.append(member.problem)
            else:
                found[member.name] = member.data
    except PictureError as error:
        problems.append(str(error))
    same = sum(PHOTOS.get(name) == file for name, file in found.items())
    if is_cut:
        assert (same, bool(problems)) == (len(found), True)
    else:  # in a header, in padding or in a picture, which is hashed and decoded
        assert same >= len(PHOTOS) - 1 or problems


def test_a_tar_that_is_compressed_or_empty_is_refused(tmp_path: Path) -> None:
    for name, data in {
        "a.tar": gzip.compress(tar_of(PHOTOS)),
        "b.tar.gz": gzip.compress(tar_of(PHOTOS)),
        "c.tar": tar_of({"a.txt": b"1"}),
        "d.tar": b"",
        "e.tar": b"no tar" * 200,
    }.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=r"none of the 4 pictures .*a\.tar is compressed with gzip, so that"):
        indexed(str(tmp_path), tmp_path.parent / "refused")
    (tmp_path / "f.tar").write_bytes(tar_of(PHOTOS))
    pictures = indexed(str(tmp_path), tmp_path.parent / "refused")
    assert {key: status for key, (status, _) in quarantine(pictures).items()} == {
        "a.tar": "compressed",
        "b.tar.gz": "compressed",
        "d.tar": "unreadable",
        "e.tar": "unreadable",
    }
    assert (len(pictures), summary(pictures)["ignored"]) == (len(PHOTOS), 1)
    with pytest.raises(DataError, match=r"no image .*6 are shards, which `python -m pipelines\.index "):
        find_pictures(str(tmp_path))


def test_a_tar_that_has_changed_is_a_problem_of_its_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(PHOTOS))
    pictures = indexed(str(tmp_path), tmp_path.parent / "changed")
    names = list(PHOTOS)
    path.write_bytes(tar_of({name: PHOTOS[name] for name in ["f.png", *names[:-1]]}))
    for key, found in read_all(pictures).items():
        assert (
            found == f"{tmp_path}/{key} is not where it was: its tar has changed. Index the pictures again."
        )
    cut = tar_of(PHOTOS)
    path.write_bytes(cut[: cut.index(PHOTOS["b/c.PNG"]) + 100])
    left = read_all(pictures)
    assert left.pop("a.tar/a.png") == [(f"{path}/a.png", PHOTOS["a.png"])]
    assert all("a.tar ends before byte" in str(problem) for problem in left.values())
    path.unlink()
    assert set(read_all(pictures).values()) == {f"{path} does not exist. Check the path."}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * 2**20), st.integers(1, 12 * 2**20)), min_size=1, max_size=30))
def test_neighbours_share_requests_that_stay_small_and_read_little_in_vain(
    gaps_and_lengths: list[tuple[int, int]],
) -> None:
    pictures, at = [], tars.BLOCK
    for number, (gap, length) in enumerate(gaps_and_lengths):
        pictures.append(Wanted(f"a.tar/{number}.png", shard=5, offset=at + gap, length=length))
        at = pictures[-1].end + tars.BLOCK
    found = list(spans(pictures[::-1]))
    assert [picture for span in found for picture in span] == pictures
    for span in found:
        num_bytes = span[-1].end - span[0].offset
        assert len(span) == 1 or num_bytes <= 32 * 2**20
        assert num_bytes <= 2 * sum(picture.length + tars.BLOCK for picture in span)
