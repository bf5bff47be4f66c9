"""A registered model gives its checkpoint's bytes wherever it is loaded, or does not become champion."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

import ctmsr.inference
from ctmsr import checkpoint
from ctmsr.config import to_dict
from ctmsr.errors import CheckpointError, TrackingError
from ctmsr.inference import upscale
from ctmsr.network import ConsistencyModel, NetworkConfig
from pipelines import register as register_module
from pipelines.register import load_model, register
from pipelines.tracking import connect, preflight

TINY = NetworkConfig(
    lq_size=16, model_channels=32, channel_mult=(1, 2), num_blocks=1, embed_dim=32, num_heads=2
)
PICTURES = np.random.default_rng(1).integers(0, 256, (2, 11, 19, 3), np.uint8)


def write_checkpoint(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    checkpoint.save(
        folder,
        model=ConsistencyModel(TINY).state_dict(),
        config={"network": to_dict(TINY), "schedule": {"sigma_max": 0.9}},
        meta={"step": 3},
        train_state={"optimizer": torch.zeros(5)},
    )
    return folder


def by_checkpoint(folder: Path, seed: int = 0) -> np.ndarray:
    model, _ = checkpoint.load_model(folder)
    return np.stack([upscale(model, lq_u8, sigma_max=0.9, seed=seed) for lq_u8 in PICTURES])


@dataclass(frozen=True)
class Registry:
    uri: str
    checkpoint: Path
    version: str

    def register(self, folder: Path, **changes: Any) -> str:
        arguments = {"model_name": "toy", "run_id": None, "metrics": {"psnr_y": 20.5}, "tags": {"data": "v1"}}
        return register(folder, tracking_uri=self.uri, **arguments | changes)

    def champion(self) -> str:
        return str(connect(self.uri).get_model_version_by_alias("toy", "champion").version)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    empty = Registry(
        preflight(f"sqlite:///{folder}/mlflow.db"), write_checkpoint(folder / "checkpoint", 0), ""
    )
    return Registry(empty.uri, empty.checkpoint, empty.register(empty.checkpoint))


def shipped_package(folder: Path, edits: dict[str, str]) -> Path:
    """A copy of the ctmsr package in which `inference.py` differs."""
    shutil.copytree(register_module.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "inference.py").read_text()
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "inference.py").write_text(text)
    return folder


def test_the_champion_gives_the_bytes_of_its_checkpoint(registry: Registry) -> None:
    model = load_model(registry.uri, "models:/toy@champion")
    assert np.array_equal(model.predict(PICTURES), by_checkpoint(registry.checkpoint))
    other = model.predict(PICTURES, params={"seed": 4})
    assert np.array_equal(other, by_checkpoint(registry.checkpoint, seed=4))
    assert not np.array_equal(other, model.predict(PICTURES))


def test_a_picture_does_not_depend_on_its_batch(registry: Registry) -> None:
    model = load_model(registry.uri, f"models:/toy/{registry.version}")
    assert np.array_equal(np.asarray(model.predict(PICTURES))[1:], model.predict(PICTURES[1:]))


@pytest.mark.parametrize(
    "bad", [PICTURES.astype(np.float32), PICTURES.astype(np.int64), PICTURES[0], PICTURES[..., :2]]
)
def test_the_signature_refuses_other_arrays(registry: Registry, bad: np.ndarray) -> None:
    model = load_model(registry.uri, "models:/toy@champion")
    with pytest.raises(MlflowException, match="schema"):
        model.predict(bad)


def test_a_version_tells_where_it_comes_from(registry: Registry) -> None:
    client = connect(registry.uri)
    version = client.get_model_version("toy", registry.version)
    assert version.tags == {"data": "v1", "metric.psnr_y": "20.5", "proven": "true"}
    assert client.get_run(str(version.run_id)).info.status == "FINISHED"
    folder = Path(registry.uri.removeprefix("sqlite:///")).parent / "artifacts"
    shipped = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "checkpoint.json", "network.py", "registered_model.py"} <= shipped
    assert checkpoint.TRAIN_STATE_FILE not in shipped
    assert not {name for name in shipped if name.endswith((".pkl", ".pyc"))}


def test_requirements_are_pinned_to_what_an_index_has(registry: Registry) -> None:
    folder = Path(registry.uri.removeprefix("sqlite:///")).parent / "artifacts"
    lines = next(folder.rglob("requirements.txt")).read_text().split()
    assert {line.partition("==")[0] for line in lines} == {
        "mlflow",
        "numpy",
        "pillow",
        "safetensors",
        "torch",
    }
    assert all("==" in line and "+" not in line for line in lines)


def test_it_loads_where_there_is_no_repository_and_no_pickle(registry: Registry, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", PICTURES)
    code = (
        "import importlib.util, mlflow, numpy as np\n"
        "assert not any(importlib.util.find_spec(name) for name in ('ctmsr', 'pipelines'))\n"
        "model = mlflow.pyfunc.load_model('models:/toy@champion')\n"
        "np.save('out.npy', model.predict(np.load('in.npy')))\n"
    )
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": registry.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, check=True, timeout=100)
    assert np.array_equal(np.load(tmp_path / "out.npy"), by_checkpoint(registry.checkpoint))


def test_two_versions_with_their_own_code_side_by_side(registry: Registry, tmp_path: Path) -> None:
    old_bytes = by_checkpoint(registry.checkpoint)
    newer = write_checkpoint(tmp_path / "newer", 1)
    package = shipped_package(tmp_path / "ctmsr", {"NOISE_BLOCK_PX = 256": "NOISE_BLOCK_PX = 128"})
    with pytest.MonkeyPatch.context() as patch:  # the checkout moves on to other noise, and registers
        patch.setattr(register_module, "PACKAGE", package)
        patch.setattr(ctmsr.inference, "NOISE_BLOCK_PX", 128)
        version = registry.register(newer)
        new_bytes = by_checkpoint(newer)
    assert registry.champion() == version
    assert not np.array_equal(new_bytes, by_checkpoint(newer))
    old_model = load_model(registry.uri, f"models:/toy/{registry.version}")
    new_model = load_model(registry.uri, f"models:/toy/{version}")
    for _ in range(2):
        assert np.array_equal(old_model.predict(PICTURES), old_bytes)
        assert np.array_equal(new_model.predict(PICTURES), new_bytes)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            {"NOISE_BLOCK_PX = 256": "NOISE_BLOCK_PX = 128"},
            "does not give the same picture as its checkpoint",
        ),
        ({"import numpy as np": "import numpy as np\n1 / 0"}, "does not load .*ZeroDivisionError"),
    ],
)
def test_a_model_that_fails_its_proof_leaves_the_champion(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: dict[str, str], message: str
) -> None:
    before = registry.champion()
    monkeypatch.setattr(register_module, "PACKAGE", shipped_package(tmp_path / "ctmsr", edits))
    with pytest.raises(TrackingError, match=message):
        registry.register(registry.checkpoint)
    assert registry.champion() == before
    newest = max(int(v.version) for v in connect(registry.uri).search_model_versions("name='toy'"))
    assert "proven" not in connect(registry.uri).get_model_version("toy", str(newest)).tags


def test_a_damaged_checkpoint_registers_nothing(registry: Registry, tmp_path: Path) -> None:
    damaged = write_checkpoint(tmp_path / "damaged", 2)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        registry.register(damaged, model_name="never")
    with pytest.raises(TrackingError, match=r"There are models: .*toy"):
        load_model(registry.uri, "models:/never@champion")


@pytest.mark.parametrize(
    ("model_uri", "message"),
    [
        ("toy", r"named models:/name@alias or models:/name/version, got 'toy'"),
        ("models:/toy", "named models:/name@alias"),
        (
            "models:/toys@champion",
            r"toys@champion is not in the registry at sqlite:.*\. There are models: toy\.",
        ),
        ("models:/toy@champ", r"There are aliases of toy: champion; versions: 1"),
        ("models:/toy/99", r"There are aliases of toy: champion; versions: 1"),
    ],
)
def test_an_unknown_model_lists_what_there_is(registry: Registry, model_uri: str, message: str) -> None:
    with pytest.raises(TrackingError, match=message):
        load_model(registry.uri, model_uri)
