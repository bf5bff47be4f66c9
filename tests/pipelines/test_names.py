"""Pictures whose names and places are as people have them, through everything that reads pictures.

Each is listed, indexed, trained on and upscaled, from a folder and from S3; or it is counted, and the message
says why it was left out.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctmsr.degradation.config import DegradationConfig
from ctmsr.errors import DataError
from ctmsr.image import decode, encode_png
from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.stream import train_stream
from pipelines.index.__main__ import main as index
from pipelines.infra.listing import list_images
from pipelines.infra.storage import list_sizes, open_uri, read_bytes, write_bytes
from pipelines.upscale.__main__ import main as upscale
from pipelines.upscale.run import find_pictures as find_inputs
from pipelines.upscale.run import target_of
from tests.conftest import S3
from tests.support.keys import keys_of

NAMES = (
    "UPPER.JPG",
    "Mixed.JpEg",
    "a space.png",
    "a#b?.PNG",
    "50%.png",
    "a%20b.png",
    "a+b.png",
    "a:b&c=d.png",
    "caf\u00e9.png",  # NFC
    "cafe\u0301.png",  # NFD: another name, of the same look
    "\u5199\u771f \U0001f600.webp",
    "~.png",
    "~user/home.png",
    "x.jpg/inside a folder named like a picture.png",
    "back\\slash.png",
    "quote'\".png",
    "{a}[b]*.png",
    "-option.png",
    ".hidden.png",
    "tab\t and \x1b[31m red.png",
    "long" * 62 + ".png",  # 252 bytes
)
"""Names that a folder and a bucket can both have."""
S3_NAMES = (
    "two//slashes.png",
    "/slash first.png",
    "../up.png",
    "dots/./here.png",
    "k" * 700 + ".png",
    "x.jpg",  # beside x.jpg/...
)
LOCAL_NAMES = ("new\nline.png",)  # moto's own routes end at a line break: see the test of listing
FOUND_OUT = {"zero.png": b"", "notes": b"no picture", "photos.zip": b"PK"}


def pictures(names: tuple[str, ...]) -> dict[str, bytes]:
    """A different small picture for each name."""
    return {
        name: encode_png(np.random.default_rng(number).integers(0, 256, (34, 33, 3), np.uint8))
        for number, name in enumerate(names)
    }


@pytest.fixture(scope="module", params=["local", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, s3: S3
) -> tuple[str, set[str]]:
    """A place full of such pictures, and their names."""
    if request.param == "s3":
        held = {f"in/{key}": data for key, data in files(NAMES + S3_NAMES).items()}
        return s3.make_bucket("names", held) + "/in", {*NAMES, *S3_NAMES}
    folder = tmp_path_factory.mktemp("places") / "in#1?"
    for key, data in files(NAMES + LOCAL_NAMES).items():
        write_bytes(f"{folder}/{key}", data)
    return str(folder), {*NAMES, *LOCAL_NAMES}


def files(names: tuple[str, ...]) -> Mapping[str, bytes]:
    return pictures(names) | FOUND_OUT


def test_listed(place: tuple[str, set[str]]) -> None:
    uri, names = place
    found = list_images(uri)
    assert {file.key for file in found.files} == names | {"zero.png"}
    assert found.num_others == 2
    assert [file.key for file in found.files] == sorted(names | {"zero.png"}, key=str.encode)
    file_system, root = open_uri(found.folder)
    for name, data in files(NAMES + (S3_NAMES if "://" in uri else LOCAL_NAMES)).items():
        assert read_bytes(file_system, f"{root}/{name}") == data


@pytest.mark.usefixtures("ray_session")
def test_indexed_and_trained_on(
    place: tuple[str, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, names = place
    out = f"{tmp_path}/it's #1.index"
    assert index([uri, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert f"{len(names)} pictures indexed, 1 quarantined, 2 other files" in printed
    summary = json.loads(Path(out, "summary.json").read_text())
    table = pq.read_table(f"{out}/quarantine-{summary['version']}.parquet").to_pylist()
    assert [(row["key"], row["status"]) for row in table] == [("zero.png", "unreadable")]
    found = find_pictures(out)
    assert set(keys_of(found)) == names
    assert streamed(found) == dict.fromkeys(names, "")


def streamed(found: Pictures) -> dict[str, str]:
    """The problem, if any, of each picture when it is trained on."""
    settings: dict[str, Any] = {"hr_crop_size": 32, "scale": 4, "seed": 0, "skip": 0, "total": len(found)}
    stream = train_stream(
        found, degradation=DegradationConfig(), global_batch_size=1, num_workers=1, **settings
    )
    return {row["key"]: row["problem"] for row in stream.iter_rows()}


@pytest.mark.usefixtures("ray_session")
def test_upscaled(
    place: tuple[str, set[str]], tiny_checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, names = place
    out = f"{tmp_path}/out ?#%"
    options = ["--output", out, "--model", tiny_checkpoint]
    assert upscale([uri, *options]) == 1
    printed = capfd.readouterr()
    assert "left out: 2 other files" in printed.out
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "zero.png is not a readable picture (0 bytes" in errors[0]
    assert errors[1:] == [f"error: 1 of {len(names) + 1} pictures could not be read."]
    written = {str(path) for path in list_sizes(out)}
    assert written == {f"{target_of(name)}_x4.png" for name in names}
    assert {"UPPER_x4.png", "a#b?_x4.png", "a%20b_x4.png", "caf\u00e9_x4.png", "cafe\u0301_x4.png"} < written
    assert not list(tmp_path.glob("*.png"))
    shapes = {decode(Path(out, name).read_bytes(), name=name).shape for name in written}
    assert shapes == {(4 * 34, 4 * 33, 3)}


def test_upscaled_one_by_one(
    place: tuple[str, set[str]], tiny_checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, names = place
    options = ["--output", str(tmp_path), "--model", tiny_checkpoint]
    some = sorted(names)
    for part in (some[:15], some[15:]):
        assert upscale([*(f"{uri}/{name}" for name in part), *options]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]  # the first names the device
        assert [line.split("]")[0] for line in lines] == [
            f"[{n}/{len(part)}" for n in range(1, len(part) + 1)
        ]
        assert all(line.isprintable() for line in lines)
    wanted = {f"{target_of(name).rpartition('/')[2]}_x4.png" for name in names}
    assert {path.name for path in tmp_path.iterdir()} == wanted


def test_a_key_cannot_lead_out_of_the_output() -> None:
    assert target_of("../../etc/x.png") == "etc/x"
    assert target_of("/a//./b.JPG") == "a/b"
    long = target_of("d" * 700 + "/" + "\u00e9" * 200 + ".png")
    assert all(len(part.encode()) <= 240 for part in long.split("/"))
    assert long != target_of("d" * 701 + "/" + "\u00e9" * 200 + ".png")


def test_a_line_break_in_a_key(s3: S3) -> None:
    """Listed as it is; moto answers 404 to a request for it, so the rest is tested with a local file."""
    if not s3.is_moto:
        pytest.skip("the key is written through moto's memory")
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    uri = s3.make_bucket("line-break")
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("line-break", "new\nline.png", b"1")
    assert [file.key for file in list_images(uri).files] == ["new\nline.png"]


def test_a_key_that_is_a_folder_too(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    files = {"x.jpg": b"1", "x.jpg/a.png": b"22", "y": b"", "y/b.png": b"333", "z/": b"", "z/c.png": b"4"}
    uri = s3.make_bucket("both", files)
    assert [file.size for file in list_images(f"{uri}/x.jpg").files] == [1]
    assert "s3://both/x.jpg is a picture and a folder" in caplog.text
    assert [file.key for file in list_images(f"{uri}/x.jpg/").files] == ["a.png"]
    assert [file.key for file in list_images(f"{uri}/y").files] == ["b.png"]
    assert [file.key for file in list_images(f"{uri}/z").files] == ["c.png"]
    assert list_images(f"{uri}/z").num_others == 0  # `z/` stands for the folder


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(f"{tmp_path}/photos/a.png", b"1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_images("~/photos").folder == f"{tmp_path}/photos"
    write_bytes("~/b.png", b"2")
    assert (tmp_path / "b.png").exists()


def test_a_single_file_is_a_picture_whatever_its_name(
    tiny_checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "IMG_0001.2024").write_bytes(pictures(("a",))["a"])
    options = ["--output", str(tmp_path / "out"), "--model", tiny_checkpoint]
    assert upscale([str(tmp_path / "IMG_0001.2024"), *options]) == 0
    assert (tmp_path / "out" / "IMG_0001.2024_x4.png").exists()


def test_two_names_that_only_some_file_systems_tell_apart(tmp_path: Path) -> None:
    for name in ("X.JPG", "x.jpg", "caf\u00e9.png", "cafe\u0301.png"):
        write_bytes(f"{tmp_path}/in/{name}", b"1")
    inputs = [f"{tmp_path}/in"]
    (tmp_path / "out").mkdir()
    assert len(find_inputs(inputs, f"{tmp_path}/out")) == 4
    assert len(find_inputs(inputs, "s3://bucket/out")) == 4
    (tmp_path / "OUT").symlink_to("out")  # as on a file system that ignores case
    with pytest.raises(DataError, match=r"would both become .*/out/.*_x\*"):
        find_inputs(inputs, f"{tmp_path}/out")


def test_a_result_with_too_long_a_path(tmp_path: Path) -> None:
    write_bytes(f"{tmp_path}/a.png", b"1")
    with pytest.raises(DataError, match=r"a path of more than 1000 bytes\. Choose a shorter --output"):
        find_inputs([f"{tmp_path}/a.png"], f"s3://bucket/{'o' * 1000}")


def test_a_hundred_thousand_in_a_folder(tmp_path: Path) -> None:
    for number in range(100_000):
        os.close(os.open(tmp_path / f"{number:06d}.jpg", os.O_CREAT))
    started = time.monotonic()
    assert len(list_images(str(tmp_path)).files) == 100_000
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_hundred_thousand_under_a_prefix(s3: S3) -> None:
    if not s3.is_moto:
        pytest.skip("the keys are written through moto's memory")
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    uri = s3.make_bucket("many")
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for number in range(100_000):
        backend.put_object("many", f"in/{number:06d}.jpg", b"")
    started = time.monotonic()
    assert len(list_images(f"{uri}/in").files) == 100_000
    assert time.monotonic() - started < 120
