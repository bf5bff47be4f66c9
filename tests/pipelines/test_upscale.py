"""The command that upscales: readable pictures are done, each once, others are named, the status says so."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctmsr.config import to_dict
from ctmsr.errors import DataError, TrackingError
from ctmsr.image import decode, encode_png
from ctmsr.model import checkpoint
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.infra.storage import list_sizes, open_uri, read_bytes, write_bytes
from pipelines.register.run import register
from pipelines.tracking.runs import preflight
from pipelines.upscale.__main__ import main
from tests.benchmarks.store import photo
from tests.conftest import Store
from tests.support.registering import TINY, register_model, tiny_model

PICTURE = np.random.default_rng(1).integers(0, 256, (11, 19, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def registry(model: ConsistencyModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a registered version of `model`."""
    uri = register_model(model, tmp_path_factory.mktemp("registry"))
    return ["--model", "models:/toy@champion", "--tracking-uri", uri]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """a.png, deep/a.PNG of another size, and broken.png."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(encode_png(PICTURE))
    (folder / "deep" / "a.PNG").write_bytes(encode_png(PICTURE[:5]))
    (folder / "broken.png").write_bytes(encode_png(PICTURE)[:100])
    return folder


def read(path: Path) -> np.ndarray:
    return decode(path.read_bytes(), name=str(path))


def test_a_bad_picture_is_named_and_the_rest_is_done(
    registry: list[str],
    model: ConsistencyModel,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "out"
    assert main([str(inputs), "--output", str(out), *registry]) == 1
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {"a_x4.png", "deep/a_x4.png"}
    assert np.array_equal(read(out / "a_x4.png"), upscale(model, PICTURE, sigma_max=0.9))
    assert np.array_equal(read(out / "deep" / "a_x4.png"), upscale(model, PICTURE[:5], sigma_max=0.9))
    printed = capsys.readouterr()
    assert f"[1/3] {inputs}/a.png -> {out}/a_x4.png (" in printed.out
    errors = printed.err.splitlines()
    assert errors[0].startswith(f"error: {inputs}/broken.png is not a readable picture")
    assert errors[1:] == ["error: 1 of 3 pictures could not be read."]


def test_one_picture_with_another_seed(
    registry: list[str], model: ConsistencyModel, inputs: Path, tmp_path: Path
) -> None:
    assert main([str(inputs / "a.png"), "--output", str(tmp_path), "--seed", "5", *registry]) == 0
    expected = upscale(model, PICTURE, sigma_max=0.9, seed=5)
    assert np.array_equal(read(tmp_path / "a_x4.png"), expected)
    assert not np.array_equal(expected, upscale(model, PICTURE, sigma_max=0.9))


def test_a_long_narrow_grey_16_bit_picture(registry: list[str], tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 37 * 1000).reshape(37, 1000).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "strip.png")
    assert main([str(tmp_path / "strip.png"), "--output", str(tmp_path), *registry]) == 0
    sr_u8 = read(tmp_path / "strip_x4.png")
    assert sr_u8.shape == (4 * 37, 4 * 1000, 3)
    rows = sr_u8.reshape(37, 4, -1).mean((1, 2))
    assert np.all(np.diff(rows) > 0)  # it still brightens from top to bottom: 16 bits were scaled, not cut


def test_two_pictures_never_share_a_name(registry: list[str], inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png and .*deep/a\.PNG would both become .*/a_x\*\."):
        main([str(inputs), str(inputs / "deep"), "--output", str(tmp_path / "out"), *registry])
    assert not (tmp_path / "out").exists()


def test_a_missing_input_stops_before_the_model_loads(inputs: Path, tmp_path: Path) -> None:
    command = [
        str(inputs),
        str(tmp_path / "absent"),
        "--output",
        str(tmp_path / "out"),
        "--model",
        "nonsense",
    ]
    with pytest.raises(DataError, match="absent does not exist"):
        main(command)


def test_an_output_that_cannot_be_written_is_no_bad_picture(
    registry: list[str], inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot use .*file/a_x4\.png"):
        main([str(inputs), "--output", str(tmp_path / "file"), *registry])


def test_a_dead_server_is_told_within_seconds(inputs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer"):
        main([str(inputs), "--output", str(tmp_path), "--tracking-uri", uri])
    assert time.monotonic() - started < 15


def test_the_command_line_ends_in_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.upscale", str(tmp_path / "absent.png"), "--output", "out"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path}/absent.png does not exist")
    assert len(ended.stderr.splitlines()) == 1


def changes(folder: Path) -> dict[str, int]:
    """When each result was written, by name."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*_x4.png")}


def test_what_is_done_is_made_again_only_for_another_picture_seed_or_version(
    registry: list[str], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inputs / "broken.png").unlink()
    out = tmp_path / "out"
    command = [str(inputs), "--output", str(out), *registry]
    assert main(command) == 0
    first = changes(out)
    assert len(first) == 2
    assert main(command) == 0
    assert changes(out) == first
    assert f"[1/2] {inputs}/a.png -> {out}/a_x4.png (done before)" in capsys.readouterr().out

    (inputs / "a.png").write_bytes(encode_png(PICTURE[:7]))
    assert main(command) == 0
    second = changes(out)
    assert {name for name in first if second[name] != first[name]} == {"a_x4.png"}
    assert len(read(out / "a_x4.png")) == 4 * 7

    assert main([*command, "--seed", "5"]) == 0
    third = changes(out)
    assert all(third[name] != second[name] for name in second)

    (out / "a_x4.png").write_bytes(encode_png(PICTURE))  # somebody else's
    assert main([*command, "--seed", "5"]) == 0
    assert len(read(out / "a_x4.png")) == 4 * 7


def test_another_version_of_the_model_makes_all_again(tmp_path: Path, inputs: Path) -> None:
    torch.manual_seed(1)
    config = {"network": to_dict(TINY), "schedule": {"sigma_max": 0.9}, "inference": {"noise_version": 2}}
    uri = preflight(f"sqlite:///{tmp_path}/mlflow.db")
    out = tmp_path / "out"
    seen = []
    for version in ("1", "2"):
        folder = tmp_path / f"checkpoint{version}"
        checkpoint.save(folder, model=ConsistencyModel(TINY).state_dict(), config=config, meta={})
        register(folder, tracking_uri=uri, model_name="toy", run_id=None, metrics={}, tags={})
        command = [str(inputs / "a.png"), "--output", str(out), "--tracking-uri", uri]
        assert main([*command, "--model", f"models:/toy/{version}"]) == 0
        seen.append(read(out / "a_x4.png"))
    assert not np.array_equal(seen[0], seen[1])


def test_the_output_is_not_searched_for_inputs(registry: list[str], inputs: Path) -> None:
    with pytest.raises(
        DataError, match=r"--output .*in/out is inside the input .*in\. Choose a location outside it"
    ):
        main([str(inputs), "--output", str(inputs / "out"), *registry])


@pytest.fixture
def many(store: Store) -> str:
    """A folder with twenty small photographs in two folders, and one that is damaged."""
    files = {f"photos/{number % 2}/{number:02d}.jpg": photo(number, 24) for number in range(20)}
    return store({**files, "photos/broken.png": encode_png(PICTURE)[:100]}) + "/photos"


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("store", ["s3", pytest.param("local", marks=pytest.mark.slow)], indirect=True)
def test_many_pictures_go_through_ray(
    many: str, registry: list[str], model: ConsistencyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    out = many.removesuffix("photos") + "large"
    command = [many, "--output", out, *registry]
    assert main(command) == 1
    assert {str(path) for path in list_sizes(out)} == {f"{n % 2}/{n:02d}_x4.png" for n in range(20)}
    file_system, root = open_uri(out)
    for number in (0, 13):
        lq_u8 = decode(photo(number, 24), name="")
        made = decode(read_bytes(file_system, f"{root}/{number % 2}/{number:02d}_x4.png"), name="")
        assert np.array_equal(made, upscale(model, lq_u8, sigma_max=0.9))
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("upscaled 20 of 21 pictures  ")
    assert printed.out.splitlines()[-1].endswith(" images/s  1 bad")
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "photos/broken.png is not a readable picture" in errors[0]
    assert errors[1:] == ["error: 1 of 21 pictures could not be read."]

    write_bytes(f"{many}/0/00.jpg", photo(100, 24))
    assert main(command) == 1
    assert "upscaled 1 of 21 pictures" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_place_that_takes_no_pictures_stops_many_of_them(
    registry: list[str], tmp_path: Path, many: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"upscaling stopped; .*cannot use .*file/.*_x4\.png"):
        main([many, "--output", str(tmp_path / "file"), *registry])


@pytest.mark.slow
def test_two_hundred_photographs_killed_twice_are_each_made_once(registry: list[str], tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "large"
    photos.mkdir()
    for number in range(200):
        (photos / f"{number:03d}.jpg").write_bytes(photo(number, 64))
    command = [sys.executable, "-m", "pipelines.upscale", str(photos), "--output", str(out), *registry]
    made: dict[str, int] = {}
    for at_least in (60, 130):
        kill_when(command, partial(has, out, at_least))
        now = changes(out)
        assert at_least <= len(now) < 200
        assert {name: now[name] for name in made} == made
        made = now
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    now = changes(out)
    assert sorted(now) == [f"{number:03d}_x4.png" for number in range(200)]
    assert {name: now[name] for name in made} == made
    last = ended.stdout.splitlines()[-1]
    assert last.startswith(f"upscaled {200 - len(made)} of 200 pictures")
    assert last.endswith(f"  {len(made)} done before")
    assert {read(path).shape for path in (out / name for name in now)} == {(256, 256, 3)}


def has(folder: Path, at_least: int) -> bool:
    """Whether there are so many results."""
    return len(changes(folder)) >= at_least


def kill_when(command: list[str], is_time: Callable[[], bool]) -> None:
    """Starts a command, kills it with SIGKILL at that time, and waits for the processes it leaves to end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not is_time():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    below = descendants(process.pid)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}/stat").exists() for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and those that they have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    todo = {pid}
    while todo:
        todo = {child for child, parent in parents.items() if parent in todo} - found
        found |= todo
    return found
