"""Which model the command upscales with: the champion, the starter where there is none, or a checkpoint."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctmsr.config import to_dict
from ctmsr.image import decode, encode_png
from ctmsr.model import checkpoint
from ctmsr.model.network import ConsistencyModel
from pipelines.upscale.__main__ import main
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


def test_without_a_champion_the_starter_upscales_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # an empty folder, as after an installation
    (tmp_path / "photo.png").write_bytes(encode_png(PICTURE))
    assert main(["photo.png", "--output", "up"]) == 0
    assert (
        "There is no champion in sqlite:///runs/mlflow.db: using the starter model" in capsys.readouterr().out
    )
    by_default = decode((tmp_path / "up" / "photo_x4.png").read_bytes(), name="up")
    assert by_default.shape == (44, 76, 3)
    assert main(["photo.png", "--output", "named", "--model", "starter"]) == 0
    np.testing.assert_array_equal(
        decode((tmp_path / "named" / "photo_x4.png").read_bytes(), name="named"), by_default
    )
    assert not (tmp_path / "runs").exists()


def test_a_registry_without_a_champion_is_asked_first(
    registry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.png").write_bytes(encode_png(PICTURE))
    assert main([str(tmp_path / "photo.png"), "--output", str(tmp_path / "up"), *registry[2:]]) == 0
    assert "using the starter model" in capsys.readouterr().out  # its model is not called ctmsr-x4


def test_a_checkpoint_upscales_as_the_registered_model_does(
    registry: list[str], model: ConsistencyModel, tmp_path: Path
) -> None:
    checkpoint.save(
        tmp_path / "checkpoint",
        model=model.state_dict(),
        config={"network": to_dict(TINY), "schedule": {"sigma_max": 0.9}, "inference": {"noise_version": 2}},
        meta={},
    )
    (tmp_path / "photo.png").write_bytes(encode_png(PICTURE))
    made = []
    for name, options in {"a": registry, "b": ["--model", str(tmp_path / "checkpoint")]}.items():
        assert main([str(tmp_path / "photo.png"), "--output", str(tmp_path / name), *options]) == 0
        made.append(decode((tmp_path / name / "photo_x4.png").read_bytes(), name=name))
    np.testing.assert_array_equal(made[0], made[1])


def test_upscaling_with_the_starter_imports_neither_mlflow_nor_ray(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encode_png(PICTURE))
    program = (
        "import sys; from pipelines.upscale.__main__ import main; "
        "assert main(['photo.png', '--output', 'up']) == 0; "
        "sys.exit(', '.join({'mlflow', 'ray'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
