"""What cannot be read, or not in the memory there is: counted and named, and the rest is done."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctmsr.errors import DataError
from ctmsr.image import encode_png
from ctmsr.image.encoding import FileFormat
from pipelines.data.pictures import find_pictures
from pipelines.index.__main__ import main as index
from pipelines.infra.listing import list_images
from pipelines.infra.storage import write_bytes
from pipelines.tracking.released import Upscale
from pipelines.upscale.__main__ import main as upscale
from pipelines.upscale.run import find_pictures as find_inputs
from pipelines.upscale.upscaler import Settings, Upscaler
from tests.support.keys import keys_of
from tests.support.permissions import permissions_hold

PICTURE = encode_png(np.random.default_rng(0).integers(0, 256, (34, 33, 3), np.uint8))


@pytest.fixture
def tangle(tmp_path: Path) -> Path:
    """A folder with a picture, links to nowhere and in circles, a pipe, and names that are not UTF-8."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(PICTURE)
    (folder / "deep" / "up").symlink_to("..")
    (folder / "here").symlink_to(".")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "broken.png").symlink_to("absent")
    (folder / "broken").symlink_to("absent")
    (folder / "linked.png").symlink_to("a.png")
    os.mkfifo(folder / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).touch()
    return folder


PROBLEMS = {
    "broken.png": "is a link to a file that cannot be read: No such file",
    "caf\\udce9.png": "has a name that is not UTF-8",
    "itself.jpg": "is a link to a file that cannot be read: Too many levels",
    "pipe.jpg": "is not a regular file",
}


def test_links_and_what_is_no_file_are_counted(tangle: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = list_images(str(tangle))
    said = {file.key: file.problem for file in found.files}
    assert set(said) == {"a.png", "linked.png", *PROBLEMS}
    assert all(text in said[key] for key, text in PROBLEMS.items())
    assert said["a.png"] == said["linked.png"] == ""
    assert found.num_others == 1
    circles = [record.getMessage() for record in caplog.records]
    assert sorted(circles) == [
        f"left out {tangle}/{link}: a link to a folder above it." for link in ("deep/up", "here")
    ]
    with pytest.raises(DataError, match=r"4 of 6 pictures listed under .* are unusable\. .*pipelines\.index"):
        find_pictures(str(tangle))


@pytest.mark.usefixtures("ray_session")
def test_links_and_what_is_no_file_are_set_aside(tangle: Path) -> None:
    assert index([str(tangle)]) == 0
    found = find_pictures(f"{tangle}.index")
    assert keys_of(found) == ["a.png"]
    (table,) = Path(f"{tangle}.index").glob("quarantine-*.parquet")
    rows = {row["key"]: row["status"] for row in pq.read_table(table).to_pylist()}
    assert rows == dict.fromkeys(PROBLEMS, "unreadable") | {"linked.png": "duplicate"}


def test_links_and_what_is_no_file_are_reported(
    tangle: Path, tiny_checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert upscale([str(tangle), "--output", str(out), "--model", tiny_checkpoint]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert all(any(text in line for line in errors) for text in PROBLEMS.values())
    assert errors[-1] == "error: 4 of 6 pictures could not be read."
    assert {path.name for path in out.iterdir()} == {"a_x4.png", "linked_x4.png"}
    with pytest.raises(DataError, match=r"pipe\.jpg is neither a file nor a folder"):
        upscale([f"{tangle}/pipe.jpg", "--output", str(out)])
    with pytest.raises(DataError, match=r"not UTF-8.*Rename it"):
        upscale([os.fsdecode(os.fsencode(tangle) + b"/caf\xe9.png"), "--output", str(out)])


def test_what_may_not_be_read_is_counted(
    tiny_checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    for key in ("a.png", "locked/b.png", "secret.png"):
        write_bytes(f"{folder}/{key}", PICTURE)
    (folder / "locked").chmod(0)
    (folder / "secret.png").chmod(0)
    with permissions_hold():
        assert upscale([str(folder), "--output", f"{tmp_path}/out", "--model", tiny_checkpoint]) == 1
        with pytest.raises(
            DataError, match=r"1 of 3 pictures .*/locked is a folder that cannot be listed: Permission"
        ):
            find_pictures(str(folder))
        with pytest.raises(DataError, match=r"cannot use .*/locked: access is denied"):
            list_images(f"{folder}/locked")
    errors = capsys.readouterr().err.splitlines()
    assert f"{folder}/locked is a folder that cannot be listed: Permission denied." in errors[0]
    assert f"{folder}/secret.png cannot be read: permission denied." in errors[1]
    assert errors[2:] == ["error: 2 of 3 pictures could not be read."]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_x4.png"]


@dataclass(frozen=True)
class Hungry:
    """A model for which memory never suffices."""

    uri: str = "hungry"
    source: str = "1"
    device: str | None = None

    def load(self) -> Upscale:
        def upscale_small(lq_u8: np.ndarray, seed: int) -> np.ndarray:
            if len(lq_u8) > 8:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB")
            return lq_u8

        return upscale_small


def test_a_picture_too_large_for_the_memory_is_counted(tmp_path: Path) -> None:
    write_bytes(f"{tmp_path}/a.png", PICTURE)
    (picture,) = find_inputs([f"{tmp_path}/a.png"], f"{tmp_path}/out")
    outcome = Upscaler(Settings(Hungry(), 0, f"{tmp_path}/out", FileFormat())).upscale(picture)
    assert outcome.problem.startswith(
        f"{tmp_path}/a.png needs more memory than there is (33x34 pixels; Runtime"
    )
