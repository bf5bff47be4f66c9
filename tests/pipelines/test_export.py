"""An export gives torch's pictures in the library that it is for, at any size, or is not kept."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from ctmsr.config import to_dict
from ctmsr.errors import ConfigError, UserError
from ctmsr.model import checkpoint
from ctmsr.model.inference import InferenceConfig, upscale
from ctmsr.model.network import ConsistencyModel, NetworkConfig
from ctmsr.model.noise import position_noise
from ctmsr.model.portable import PortableModel
from pipelines.export import source as source_module
from pipelines.export.__main__ import main
from pipelines.export.formats import FORMATS, Format
from pipelines.export.hugging_face import CTMSR
from pipelines.export.run import fetched_source
from pipelines.export.source import check_agreement
from pipelines.infra.checkpoints import fetched
from tests.support.tiny import filled_model
from tests.support.torchvision import make_importable

NETWORK = NetworkConfig(
    scale=2, lq_size=16, model_channels=32, channel_mult=(1, 2), num_blocks=1, embed_dim=32, num_heads=2
)
SETTINGS = {"sigma_max": 0.8, "config": InferenceConfig(colour_hold_px=1.5)}
SIZES = ((16, 16), (16, 48), (80, 32), (5, 37))
"""Heights and widths; the first is that of the traced picture."""


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    return filled_model(NETWORK).eval()


@pytest.fixture(scope="module")
def folder(model: ConsistencyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("export") / "checkpoint"
    config = {
        "name": "toy",
        "storage_uri": "s3://secret/runs",
        "network": to_dict(NETWORK),
        "schedule": {"sigma_max": 0.8},
        "inference": to_dict(SETTINGS["config"]),
        "register": {"licence": "CC-BY-4.0"},
        "data": {"train_uri": "s3://secret/photos", "eval_crop_size": 64},
    }
    meta = {"step": 7, "metrics": {"lpips": 0.25}, "train_version": "c0ffee"}
    state = {"optimizer": torch.zeros(5)}
    checkpoint.save(folder, model=model.state_dict(), config=config, meta=meta, train_state=state)
    return folder


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    """The ONNX file, as another program opens it."""
    path = tmp_path_factory.mktemp("onnx") / "toy.onnx"
    assert main([str(folder), "--to", "onnx", "--output", str(path)]) == 0
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def exported(folder: Path, form: str, path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main([str(folder), "--to", form, "--output", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"written: {path} (")
    return path


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def as_others_have_it(lq_u8: np.ndarray) -> np.ndarray:
    """(1, 3, h, w) in [0, 1]."""
    return np.ascontiguousarray(lq_u8.transpose(2, 0, 1)[None], np.float32) / 255


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def to_levels(sr: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = np.rint(255 * sr[0].transpose(1, 2, 0)).astype(np.uint8)
    return pixels


def test_it_is_upscale_in_other_units(model: ConsistencyModel) -> None:
    portable = PortableModel(model, sigma_max=0.8, colour_hold_px=1.5)
    lq_u8 = picture(16, 32)
    noise = position_noise(3, slice(0, 32), slice(0, 64))[None]
    with torch.inference_mode():
        sr = portable(torch.from_numpy(as_others_have_it(lq_u8)), noise)
    assert 0 <= sr.min() < sr.max() <= 1
    assert np.array_equal(to_levels(sr.numpy()), upscale(model, lq_u8, seed=3, **SETTINGS))  # type: ignore[arg-type]


def test_onnx_runtime_gives_torch_s_pictures_at_any_size(
    model: ConsistencyModel, session: onnxruntime.InferenceSession
) -> None:
    told = session.get_modelmeta().custom_metadata_map
    assert (told["licence"], told["sigma_max"], told["tile"]) == ("CC-BY-4.0", "0.8", "256")
    multiple, scale = int(told["padding_multiple"]), int(told["scale"])
    for height, width in SIZES:
        lq_u8 = picture(height, width)
        padded = np.pad(lq_u8, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")
        rows, columns = (slice(0, scale * side) for side in padded.shape[:2])
        noise = position_noise(3, rows, columns)[None].numpy()
        (sr,) = session.run(["sr"], {"lq": as_others_have_it(padded), "noise": noise})
        cut = to_levels(sr)[: scale * height, : scale * width]
        expected = upscale(model, lq_u8, seed=3, **SETTINGS)  # type: ignore[arg-type]
        assert levels_apart(cut, expected) <= 1
        assert np.mean(cut != expected) < 0.001


def test_onnx_runtime_takes_several_pictures_at_a_time(session: onnxruntime.InferenceSession) -> None:
    lq = np.concatenate([as_others_have_it(picture(16, 32)), as_others_have_it(255 - picture(16, 32))])
    noise = np.random.default_rng(0).standard_normal((2, 3, 32, 64), np.float32)
    (both,) = session.run(["sr"], {"lq": lq, "noise": noise})
    for i in range(2):
        (alone,) = session.run(["sr"], {"lq": lq[i : i + 1], "noise": noise[i : i + 1]})
        np.testing.assert_allclose(both[i], alone[0], atol=1e-5)


def test_spandrel_loads_the_file_and_gives_torch_s_pictures(
    model: ConsistencyModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_importable()
    import spandrel

    from pipelines.export.spandrel_file import CtmsrArchitecture

    path = exported(folder, "spandrel", tmp_path / "toy.safetensors", capsys)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["settings"])["network"] == to_dict(NETWORK)
        assert file.metadata()["licence"] == "CC-BY-4.0"
    registry = spandrel.MAIN_REGISTRY.copy()
    registry.add(spandrel.ArchSupport.from_architecture(CtmsrArchitecture()))
    loaded = spandrel.ModelLoader(registry=registry).load_from_file(path)
    assert isinstance(loaded, spandrel.ImageModelDescriptor)
    assert (loaded.scale, loaded.purpose, loaded.size_requirements.multiple_of) == (2, "SR", 16)
    for height, width in SIZES[:3]:
        lq_u8 = picture(height, width)
        sr = loaded(torch.from_numpy(as_others_have_it(lq_u8)))
        assert np.array_equal(to_levels(sr.numpy()), upscale(model, lq_u8, **SETTINGS))  # type: ignore[arg-type]
    full = loaded(torch.from_numpy(as_others_have_it(picture(10, 37))))
    assert full.shape == (1, 3, 20, 74)
    half = loaded.bfloat16()(torch.from_numpy(as_others_have_it(picture(10, 37))).bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().mean() < 0.02


def test_from_pretrained_reads_the_hugging_face_folder(
    model: ConsistencyModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(folder, "hf", tmp_path / "toy-x2", capsys)
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "checkpoint.json",
    }
    loaded = CTMSR.from_pretrained(str(path))
    lq_u8 = picture(40, 24)
    expected = upscale(model, lq_u8, seed=2, **SETTINGS)  # type: ignore[arg-type]
    assert np.array_equal(loaded.upscale(lq_u8, seed=2), expected)
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "| lpips | 0.2500 |" in card


def test_a_hugging_face_folder_is_a_checkpoint_without_addresses(
    model: ConsistencyModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(folder, "hf", tmp_path / "toy-x2", capsys)
    assert not any(b"secret" in file.read_bytes() for file in path.iterdir())
    again = tmp_path / "again"
    CTMSR.from_pretrained(path).save_pretrained(again)
    for one in (path, again):
        with fetched(str(one)) as copy:
            found, manifest = checkpoint.load_model(copy)
        assert manifest.config["schedule"]["sigma_max"] == 0.8
        assert manifest.config["inference"] == to_dict(SETTINGS["config"])
        for name, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
    assert "train_version" not in (path / "checkpoint.json").read_text()


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_an_export_that_gives_other_pictures_is_refused(folder: Path, error: float) -> None:
    with fetched_source(str(folder)) as source:
        portable = source.portable()
        assert check_agreement(source, lambda lq, noise: portable(lq, noise) + 5e-5, "it") > 4e-5
        with pytest.raises(UserError, match="gives another picture than torch for 16x16 pixels"):
            check_agreement(source, lambda lq, noise: portable(lq, noise) + error, "it")
        with pytest.raises(UserError, match="Nothing was kept"):
            check_agreement(source, lambda lq, noise: portable(lq, noise)[..., 1:], "it")


def test_what_does_not_agree_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "TOLERANCE", -1.0)
    for form in ("onnx", "hf"):
        with pytest.raises(UserError, match="gives another picture than torch"):
            main([str(folder), "--to", form, "--output", str(tmp_path / "new" / "toy")])
        assert list((tmp_path / "new").iterdir()) == []


def test_the_default_name_is_the_run_s_and_nothing_is_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(folder), "--to", "hf"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["toy-x2"]
    with pytest.raises(ConfigError, match="toy-x2 already exists, and an export overwrites nothing"):
        main([str(folder), "--to", "hf"])
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match="taken already exists"):
        main(["no/such/checkpoint", "--to", "onnx", "--output", "taken"])


def test_a_package_that_is_missing_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "onnx", Format("", ".onnx", ("onnx", "no_such_package"), "onnx_file"))
    with pytest.raises(ConfigError, match=r"--to onnx needs no_such_package.*'ctmsr-ray\[export\]'"):
        main(["starter", "--to", "onnx"])
    monkeypatch.setitem(FORMATS, "onnx", Format("", ".onnx", (), "no_such_module"))
    with pytest.raises(ConfigError, match="cannot be imported here"):
        main(["starter", "--to", "onnx"])
