"""A registered model gives its checkpoint's bytes wherever it is loaded, or becomes no version at all."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

import ctmsr.model.inference
from ctmsr.errors import CheckpointError, TrackingError
from ctmsr.image import decode, encode_png
from ctmsr.model import checkpoint
from ctmsr.model.noise import position_noise
from pipelines.register import run as register_module
from pipelines.register.promotion import Decision
from pipelines.register.run import register
from pipelines.tracking.models import find_version, load_model
from pipelines.tracking.released import fetched_checkpoint
from pipelines.tracking.runs import connect, preflight
from tests.support.registering import (
    PICTURES,
    StatedComparison,
    by_checkpoint,
    register_stated,
    write_checkpoint,
)
from tests.support.servers.processes import Server, mlflow_server

OTHER_NOISE = {"sigma_max * position_noise": "sigma_max / 2 * position_noise"}
"""A change of `inference.py` that changes pictures."""


@dataclass(frozen=True)
class Registry:
    uri: str
    checkpoint: Path
    version: str

    def register(self, folder: Path, **changes: Any) -> Decision:
        arguments = {
            "model_name": "toy",
            "run_id": None,
            "metrics": {"test_psnr_y": 20.5},
            "tags": {"data": "v1"},
            "comparison": StatedComparison(),
        }
        return register(folder, tracking_uri=self.uri, **arguments | changes)

    def champion(self) -> str:
        return str(connect(self.uri).get_model_version_by_alias("toy", "champion").version)

    def files(self, version: str, tmp_path: Path) -> Path:
        """What a version consists of, fetched."""
        source = connect(self.uri).get_model_version_download_uri("toy", version)
        folder = mlflow.artifacts.download_artifacts(
            source, dst_path=str(tmp_path / "model"), tracking_uri=self.uri, registry_uri=self.uri
        )
        return Path(folder)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    uri = preflight(f"sqlite:///{folder}/mlflow.db")
    empty = Registry(uri, write_checkpoint(folder / "checkpoint", 0), "")
    return Registry(empty.uri, empty.checkpoint, empty.register(empty.checkpoint).version)


def shipped_package(folder: Path, edits: dict[str, str]) -> Path:
    """A copy of the ctmsr package in which `inference.py` differs."""
    shutil.copytree(register_module.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (file,) = folder.rglob("inference.py")
    text = file.read_text()
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return folder


def test_the_champion_gives_the_bytes_of_its_checkpoint(registry: Registry) -> None:
    model = load_model(registry.uri, "models:/toy@champion")
    assert np.array_equal(model.predict(PICTURES), by_checkpoint(registry.checkpoint))
    other = model.predict(PICTURES, params={"seed": 4})
    assert np.array_equal(other, by_checkpoint(registry.checkpoint, seed=4))
    assert not np.array_equal(other, model.predict(PICTURES))


def test_its_device_can_be_forced(registry: Registry) -> None:
    version = find_version(registry.uri, "models:/toy@champion", "cpu")
    assert np.array_equal(version.load()(PICTURES[0], 0), by_checkpoint(registry.checkpoint)[0])
    with pytest.raises(TrackingError, match=r"does not load \(ConfigError: there is no device 'rocm' here"):
        find_version(registry.uri, "models:/toy@champion", "rocm").load()


def test_its_weights_can_be_fetched_by_its_name(registry: Registry) -> None:
    for name in ("models:/toy@champion", f"models:/toy/{registry.version}"):
        with fetched_checkpoint(name, registry.uri) as (folder, licence):
            found, _ = checkpoint.load_model(folder)
        assert licence == "Apache-2.0"
        expected, _ = checkpoint.load_model(registry.checkpoint)
        assert all(
            torch.equal(value, found.state_dict()[key]) for key, value in expected.state_dict().items()
        )
    with (
        pytest.raises(TrackingError, match="models:/toy@other is not in the registry"),
        fetched_checkpoint("models:/toy@other", registry.uri),
    ):
        pass


def test_a_picture_does_not_depend_on_its_batch(registry: Registry) -> None:
    model = load_model(registry.uri, f"models:/toy/{registry.version}")
    assert np.array_equal(np.asarray(model.predict(PICTURES))[1:], model.predict(PICTURES[1:]))


def test_it_takes_arrays_paths_and_bytes_and_lists_of_them(registry: Registry, tmp_path: Path) -> None:
    model = load_model(registry.uri, f"models:/toy/{registry.version}")
    expected = by_checkpoint(registry.checkpoint)
    file = tmp_path / "picture.png"
    file.write_bytes(encode_png(PICTURES[0]))
    for one in (PICTURES[0], str(file), file, file.read_bytes(), bytearray(file.read_bytes())):
        sr_u8: Any = model.predict(one)
        assert isinstance(sr_u8, np.ndarray)
        assert sr_u8.dtype == np.uint8
        assert np.array_equal(sr_u8, expected[0])
    several: Any = model.predict([file, PICTURES[1], PICTURES[0, :5]], params={"seed": 0})
    assert isinstance(several, list)
    assert np.array_equal(several[0], expected[0])
    assert np.array_equal(several[1], expected[1])
    assert several[2].shape == (20, 76, 3)
    assert np.array_equal(model.predict(PICTURES.astype(np.int64)), expected)  # what JSON becomes


def test_it_reads_picture_files_as_viewers_show_them(registry: Registry, tmp_path: Path) -> None:
    model = load_model(registry.uri, f"models:/toy/{registry.version}")
    alpha = np.random.default_rng(2).integers(0, 256, (11, 19, 1), np.uint8)
    Image.fromarray(np.concatenate([PICTURES[0], alpha], axis=2)).save(tmp_path / "alpha.png")
    shown = decode((tmp_path / "alpha.png").read_bytes(), name="alpha.png")
    assert np.array_equal(model.predict(tmp_path / "alpha.png"), model.predict(shown))


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (PICTURES.astype(np.float32), r"got float32 of shape \(2, 11, 19, 3\)"),
        (PICTURES.astype(np.uint16), r"got uint16 of shape"),
        (PICTURES.astype(np.int64) - 1, r"got int64 of shape"),
        (PICTURES[0, 0], r"got uint8 of shape \(19, 3\)"),
        (PICTURES[..., :2], r"got uint8 of shape \(2, 11, 19, 2\)"),
        (PICTURES[:0], r"got uint8 of shape \(0, 11, 19, 3\)"),
        ([], "there is no picture in the input"),
        (np.array(["/etc/hostname"]), r"got <U13 of shape \(1,\)"),
        ({"path": "a.png"}, "got dict"),
        (b"no picture", "a picture of 10 bytes is not a readable picture"),
    ],
)
def test_it_refuses_other_inputs_with_what_it_takes(registry: Registry, bad: Any, got: str) -> None:
    model = load_model(registry.uri, f"models:/toy/{registry.version}")
    with pytest.raises(ValueError, match=got):
        model.predict(bad)
    with pytest.raises(OSError, match=r"none\.png"):
        model.predict("none.png")
    with pytest.raises(MlflowException, match="seed"):
        model.predict(PICTURES, params={"seed": "one"})


def test_a_version_tells_where_it_comes_from(registry: Registry) -> None:
    client = connect(registry.uri)
    version = client.get_model_version("toy", registry.version)
    lineage = {"step": "3", "train_version": "0123456789abcdef", "commit": "c0ffee"}
    expected = {f"lineage.{name}": text for name, text in lineage.items()}
    expected |= {"data": "v1", "metric.test_psnr_y": "20.5", "proven": "true", "licence": "Apache-2.0"}
    assert version.tags.items() >= (expected | {"lineage.train_uri": "s3://photos.index"}).items()
    assert client.get_run(str(version.run_id)).info.status == "FINISHED"


def test_a_version_holds_code_weights_licence_and_card_but_no_pickle(
    registry: Registry, tmp_path: Path
) -> None:
    folder = registry.files(registry.version, tmp_path)
    shipped = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "checkpoint.json", "network.py", "registered_model.py"} <= shipped
    assert {"MLmodel", "LICENSE", "README.md", "sample.png", "input_example.json"} <= shipped
    assert checkpoint.TRAIN_STATE_FILE not in shipped
    assert not {name for name in shipped if name.endswith((".pkl", ".pyc"))}
    card = (folder / "README.md").read_text()
    for text in (
        "# toy\n",
        "![LR, bicubic, this model, HR](sample.png)",
        "| LPIPS | 0.4000 | 0.9500 |",
        "as stated. Evaluation set a.",
        'mlflow.pyfunc.load_model("models:/toy@champion")',
        "| train_version | 0123456789abcdef |",
        "| commit | c0ffee |",
        "| train_uri | s3://photos.index |",
        "Weights: Apache-2.0.",
    ):
        assert text in card
    assert decode((folder / "sample.png").read_bytes(), name="sample").shape == PICTURES[0].shape
    description = connect(registry.uri).get_model_version("toy", registry.version).description
    assert description is not None
    assert "sample.png" not in description
    assert "| LPIPS | 0.4000 | 0.9500 |" in description


def test_the_signature_says_what_comes_out_and_the_example_goes_in(
    registry: Registry, tmp_path: Path
) -> None:
    model = mlflow.pyfunc.load_model(str(registry.files(registry.version, tmp_path)))
    signature = model.metadata.signature
    assert signature is not None
    assert signature.inputs is None
    assert "uint8" in str(signature.outputs)
    assert "seed" in str(signature.params)
    assert model.predict(model.input_example).shape == (1, 80, 112, 3)


def test_requirements_are_pinned_to_what_an_index_has(registry: Registry, tmp_path: Path) -> None:
    lines = (registry.files(registry.version, tmp_path) / "requirements.txt").read_text().split()
    names = {"mlflow-skinny", "numpy", "pandas", "pillow", "safetensors", "torch"}
    assert {line.partition("==")[0] for line in lines} == names
    assert all("==" in line and "+" not in line for line in lines)


def test_it_loads_where_there_is_no_repository_and_no_pickle(registry: Registry, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", PICTURES)
    code = (
        "import sys\n"
        "sys.modules['ctmsr'] = sys.modules['pipelines'] = None  # as where they are not installed\n"
        "import mlflow, numpy as np\n"
        "model = mlflow.pyfunc.load_model('models:/toy@champion')\n"
        "np.save('out.npy', model.predict(np.load('in.npy')))\n"
    )
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": registry.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, check=True, timeout=100)
    assert np.array_equal(np.load(tmp_path / "out.npy"), by_checkpoint(registry.checkpoint))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder) as started:
        yield started


CONSUMER = """
import importlib.util, pathlib, mlflow, numpy as np
missing = ("ctmsr", "pipelines", "sqlalchemy", "ray", "pyarrow", "cv2", "scipy")
assert not any(importlib.util.find_spec(name) for name in missing)
model = mlflow.pyfunc.load_model("models:/ctmsr-x4@champion")
pixels, file = np.load("in.npy"), pathlib.Path("in.png")
np.save("out.npy", model.predict(pixels))
np.save("files.npy", np.stack([model.predict(one) for one in ("in.png", file.read_bytes(), pixels[0])]))
"""


@pytest.mark.slow
def test_it_predicts_the_bytes_of_the_checkpoint_in_a_clean_environment(
    server: Server, tmp_path: Path
) -> None:
    """With what its requirements.txt names and nothing else, in a folder without our code."""
    uri, folder = preflight(server.url), write_checkpoint(tmp_path / "checkpoint", 0)
    assert register_stated(uri, folder, "ctmsr-x4").is_promoted
    source = connect(uri).get_model_version_download_uri("ctmsr-x4", "1")
    requirements = mlflow.artifacts.download_artifacts(
        f"{source}/requirements.txt", dst_path=str(tmp_path), tracking_uri=uri, registry_uri=uri
    )
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)

    consumer = tmp_path / "consumer"
    consumer.mkdir()
    np.save(consumer / "in.npy", PICTURES)
    (consumer / "in.png").write_bytes(encode_png(PICTURES[0]))
    environment = {
        "HOME": str(consumer),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([python, "-I", "-c", CONSUMER], cwd=consumer, env=environment, check=True, timeout=300)
    expected = by_checkpoint(folder)
    assert np.array_equal(np.load(consumer / "out.npy"), expected)
    assert np.array_equal(np.load(consumer / "files.npy"), np.stack([expected[0]] * 3))


def test_two_versions_with_their_own_code_side_by_side(registry: Registry, tmp_path: Path) -> None:
    old_bytes = by_checkpoint(registry.checkpoint)
    newer = write_checkpoint(tmp_path / "newer", 1, lpips=0.1)
    package = shipped_package(tmp_path / "ctmsr", OTHER_NOISE)
    with pytest.MonkeyPatch.context() as patch:  # the checkout moves on to other noise, and registers
        patch.setattr(register_module, "PACKAGE", package)
        patch.setattr(ctmsr.model.inference, "position_noise", lambda *where: position_noise(*where) / 2)
        version = registry.register(newer).version
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
            OTHER_NOISE,
            "does not give the same picture as its checkpoint .* no version was created",
        ),
        ({"import numpy as np": "import numpy as np\n1 / 0"}, "does not load .*ZeroDivisionError"),
    ],
)
def test_a_model_that_fails_its_proof_becomes_no_version(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: dict[str, str], message: str
) -> None:
    client, champion = connect(registry.uri), registry.champion()
    before = len(client.search_model_versions("name='toy'"))
    monkeypatch.setattr(register_module, "PACKAGE", shipped_package(tmp_path / "ctmsr", edits))
    with pytest.raises(TrackingError, match=message):
        registry.register(registry.checkpoint)
    assert registry.champion() == champion
    assert len(client.search_model_versions("name='toy'")) == before


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
        ("toy", "models:/name@alias or models:/name/version, got 'toy'"),
        ("models:/toy", "models:/name@alias or"),
        (
            "models:/toys@champion",
            r"toys@champion is not in the registry at sqlite:.*\. There are models: toy\.",
        ),
        ("models:/toy@champ", r"There are aliases of toy: champion.*; versions: 1"),
        ("models:/toy/99", r"There are aliases of toy: champion.*; versions: 1"),
    ],
)
def test_an_unknown_model_lists_what_there_is(registry: Registry, model_uri: str, message: str) -> None:
    with pytest.raises(TrackingError, match=message):
        load_model(registry.uri, model_uri)
