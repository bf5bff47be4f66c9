"""The command that upscales: every readable picture is done, every other is named, the status says so."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctmsr import checkpoint
from ctmsr.config import to_dict
from ctmsr.errors import DataError, TrackingError
from ctmsr.image import decode, encode_png
from ctmsr.inference import upscale
from ctmsr.network import ConsistencyModel, NetworkConfig
from pipelines.register import register
from pipelines.tracking import preflight
from pipelines.upscale import main

TINY = NetworkConfig(
    lq_size=16, model_channels=32, channel_mult=(1, 2), num_blocks=1, embed_dim=32, num_heads=2
)
PICTURE = np.random.default_rng(1).integers(0, 256, (11, 19, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    torch.manual_seed(0)
    return ConsistencyModel(TINY).eval()


@pytest.fixture(scope="module")
def registry(model: ConsistencyModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a registered version of `model`."""
    folder = tmp_path_factory.mktemp("registry")
    config = {"network": to_dict(TINY), "schedule": {"sigma_max": 0.9}}
    checkpoint.save(folder / "checkpoint", model=model.state_dict(), config=config, meta={})
    uri = preflight(f"sqlite:///{folder}/mlflow.db")
    register(folder / "checkpoint", tracking_uri=uri, model_name="toy", run_id=None, metrics={}, tags={})
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
    with pytest.raises(DataError, match=r"a\.png and .*deep/a\.PNG would both become .*/a_x\*\.png"):
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
