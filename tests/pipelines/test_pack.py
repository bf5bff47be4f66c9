"""Packing: tars of an index's usable pictures, the same whenever and however often it is begun."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from ctmsr.errors import DataError, UserError
from pipelines.data.pictures import find_pictures
from pipelines.index.__main__ import main as index
from pipelines.index.pack import pack, write_shard
from pipelines.infra.storage import list_sizes, open_uri, read_bytes, write_bytes
from tests.conftest import Store
from tests.support.keys import keys_of
from tests.support.malformed import bad, good

pytestmark = pytest.mark.usefixtures("ray_session")
NAMES = ("a/\u5199\u771f.png", "a/" + "long" * 40 + ".jpg", "a#b?.jpg")


def contents(uri: str) -> dict[str, bytes]:
    file_system, root = open_uri(uri)
    return {str(path): read_bytes(file_system, f"{root}/{path}") for path in sorted(list_sizes(uri))}


def members(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


def test_usable_pictures_are_packed_once_and_a_packing_goes_on(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    usable = {key: data for key, (data, _) in good(24, seed=20).items()}
    usable |= dict(zip(NAMES, [data for data, _ in good(3, seed=21).values()], strict=True))
    broken = {key: data for key, (data, _) in bad(4, seed=22).items()}
    uri = store({f"photos/{key}": data for key, data in (usable | broken).items()})
    assert index([f"{uri}/photos", "--pack", f"{uri}/tars", "--tar-mb", "0.1"]) == 0
    said = capsys.readouterr().out
    assert f"next: python -m pipelines.train --set data.train_uri={uri}/tars.index" in said
    tars = contents(f"{uri}/tars")
    packed = [members(tar) for tar in tars.values()]
    assert len(tars) > 2
    assert {name: data for some in packed for name, data in some.items()} == usable
    assert sum(map(len, packed)) == len(usable)
    assert [name for some in packed for name in some] != sorted(usable)
    pictures = find_pictures(f"{uri}/tars.index")
    assert keys_of(pictures) == [
        f"{tar}/{name}" for tar, some in zip(tars, packed, strict=True) for name in some
    ]

    file_system, root = open_uri(f"{uri}/tars")
    file_system.delete_file(f"{root}/000001.tar")  # as if it had been killed before
    with pytest.raises(DataError, match=r"holds tars of another set of pictures, or of another size"):
        again(uri, tar_bytes=50_000)
    again(uri)
    assert contents(f"{uri}/tars") == tars
    assert find_pictures(f"{uri}/tars.index").version == pictures.version

    write_bytes(f"{uri}/tars/000001.tar", tars["000001.tar"][:20_000])
    with pytest.raises(DataError, match=r"tars\.index has \d+ of 27 pictures and says which tar is damaged"):
        again(uri)


def again(uri: str, tar_bytes: int = 100_000) -> None:
    """Packs without another look at the photographs."""
    pack(f"{uri}/photos.index", f"{uri}/tars", shard_bytes=tar_bytes, min_side=32)


def test_a_picture_that_has_changed_is_not_packed(tmp_path: Path) -> None:
    ((data, _),) = good(1, seed=23).values()
    write_bytes(f"{tmp_path}/photos/a.jpg", data)
    assert index([f"{tmp_path}/photos"]) == 0
    pictures = find_pictures(f"{tmp_path}/photos.index")
    row = {"key": "a.jpg", "format": "JPEG", "sha256": "0"}
    with pytest.raises(DataError, match=r"photos/a\.jpg has changed since it was indexed\. Index the pict"):
        write_shard([row], pictures.places, f"{tmp_path}/tars/0.tar")
    (tmp_path / "photos/a.jpg").unlink()
    with pytest.raises(DataError, match=r"photos/a\.jpg does not exist.*Index the pictures again, then pack"):
        write_shard([row], pictures.places, f"{tmp_path}/tars/0.tar")
    assert not (tmp_path / "tars").exists()


def test_places_that_cannot_be_packed_to_are_told(tmp_path: Path) -> None:
    folder = f"{tmp_path}/photos"
    for name, (data, _) in good(1, seed=24).items():
        write_bytes(f"{folder}/{name}", data)
    for options, message in (
        (["--pack", f"{folder}/tars"], r"--pack .*photos/tars is inside the folder it indexes"),
        (["--pack", f"{tmp_path}/x.index"], r"--pack is a folder for tars"),
        (["--pack", f"{tmp_path}/x", "--lq", folder], r"--pack writes no pairs"),
        (["--pack", f"{tmp_path}/x", "--tar-mb", "0"], r"--tar-mb must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            index([folder, *options])
    (tmp_path / "x").mkdir()
    (tmp_path / "x/notes").write_text(json.dumps(1))
    with pytest.raises(DataError, match=r"/x has files already\. Name a new folder"):
        index([folder, "--pack", f"{tmp_path}/x"])
