"""A checkpoint round-trips exactly, exists whole or not at all, and every way to damage it is named."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctmsr.config import to_dict
from ctmsr.errors import CheckpointError
from ctmsr.model import checkpoint
from ctmsr.model.network import ConsistencyModel, NetworkConfig

TINY = NetworkConfig(
    lq_size=16, model_channels=32, channel_mult=(1, 2), num_blocks=1, embed_dim=32, num_heads=2
)
CONFIG = {"network": to_dict(TINY), "schedule": {"sigma_max": 1.0}, "inference": {"noise_version": 2}}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return ConsistencyModel(TINY).state_dict()


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    target = tmp_path / "runs" / "step-3"
    checkpoint.save(
        target, model=weights, config=CONFIG, meta={"step": 3}, train_state={"m": torch.arange(6.0)}
    )
    return target


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / checkpoint.MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_exact(folder: Path, weights: dict[str, Tensor]) -> None:
    model, manifest = checkpoint.load_model(folder)
    assert not model.training
    assert model.config == TINY
    assert (manifest.config, manifest.meta) == (CONFIG, {"step": 3})
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert torch.equal(checkpoint.load_train_state(folder)["m"], torch.arange(6.0))


def test_nothing_but_the_checkpoint_is_left_beside_it(folder: Path) -> None:
    assert list(folder.parent.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "train_state.safetensors",
        "checkpoint.json",
    }


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save(tmp_path / "c", model=weights, config=CONFIG, meta={"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    checkpoint.save(tmp_path, model=weights, config=CONFIG, meta={})
    assert checkpoint.read_manifest(tmp_path).meta == {}


def test_a_checkpoint_is_never_overwritten(folder: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="already exists"):
        checkpoint.save(folder, model=weights, config=CONFIG, meta={"step": 4})
    assert checkpoint.read_manifest(folder).meta == {"step": 3}


def test_a_released_checkpoint_has_no_training_state(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    checkpoint.save(tmp_path / "c", model=weights, config=CONFIG, meta={})
    with pytest.raises(CheckpointError, match="no training state"):
        checkpoint.load_train_state(tmp_path / "c")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent"):
        checkpoint.read_manifest(tmp_path / "absent")


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "train_state.safetensors"])
def test_each_missing_file_makes_it_incomplete(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete: {re.escape(name)} is missing"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.safetensors"])
def test_one_flipped_bit_is_noticed(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged: the SHA-256 of {re.escape(name)}"):
        checkpoint.load_model(folder)


def test_a_cut_file_is_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors has 100 bytes"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": "x"}', "\udcff"])
def test_an_unreadable_manifest_is_damage(folder: Path, text: str) -> None:
    (folder / "checkpoint.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"damaged: checkpoint\.json does not read"):
        checkpoint.read_manifest(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder: Path) -> None:
    entry = {"bytes": 1, "sha256": "0"}
    edit_manifest(folder, files={"model.safetensors": entry, "../../secret": entry})
    with pytest.raises(CheckpointError, match="unexpected list of files"):
        checkpoint.read_manifest(folder)


def test_a_newer_format_says_update(folder: Path) -> None:
    edit_manifest(folder, format_version=2)
    with pytest.raises(
        CheckpointError, match=r"format 2, .* up to 1: it was made by a newer release\. Upgrade"
    ):
        checkpoint.read_manifest(folder)


def test_weights_of_another_shape_are_listed(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    names = list(weights)
    changed = {name: tensor for name, tensor in weights.items() if name not in names[:4]}
    changed |= {names[4]: torch.zeros(7), "alien": torch.zeros(1), "other": torch.zeros(1)}
    checkpoint.save(tmp_path / "c", model=changed, config=CONFIG, meta={})
    with pytest.raises(CheckpointError, match="of another shape") as caught:
        checkpoint.load_model(tmp_path / "c")
    message = str(caught.value)
    assert all(f"{name} is missing" in message for name in names[:4])
    assert "alien is not in the network and 2 more." in message
    assert "other is" not in message


def test_a_misshaped_tensor_is_told_with_both_shapes(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    changed = weights | {"model.conv_last.bias": torch.zeros(7)}
    checkpoint.save(tmp_path / "c", model=changed, config=CONFIG, meta={})
    with pytest.raises(CheckpointError, match=r"conv_last\.bias has shape \(7,\) instead of \(3,\)"):
        checkpoint.load_model(tmp_path / "c")


def test_a_config_that_does_not_load_names_the_key(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    checkpoint.save(tmp_path / "c", model=weights, config={"network": {"embed_dims": 32}}, meta={})
    with pytest.raises(CheckpointError, match=r"network\.embed_dims. Did you mean embed_dim"):
        checkpoint.load_model(tmp_path / "c")


class Bomb:
    """Leaves a file behind when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    yield pickle.dumps(Bomb(tmp_path / "exploded"))
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_file_is_refused_unopened(tmp_path: Path, bomb: bytes) -> None:
    (tmp_path / "ctmsr.pth").write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"Pickled weights .* never read"):
        checkpoint.load_model(tmp_path / "ctmsr.pth")


def test_a_pickle_in_place_of_weights_is_refused_unopened(folder: Path, bomb: bytes) -> None:
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_model(folder)


def test_views_and_permuted_tensors_keep_their_values(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"transposed": base.T, "head": base[0], "tail": base[1:], "scalar": torch.tensor(5)}
    checkpoint.save(tmp_path / "c", model=weights, config=CONFIG, meta={}, train_state=state)
    loaded = checkpoint.load_train_state(tmp_path / "c")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_files_are_plain_safetensors(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    loaded = load_file(folder / "model.safetensors")
    save_file(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_checkpoint_from_before_two_versions_of_the_noise_means_the_first(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    before = {name: section for name, section in CONFIG.items() if name != "inference"}
    checkpoint.save(tmp_path / "c", model=weights, config=before, meta={})
    assert checkpoint.read_manifest(tmp_path / "c").config["inference"] == {"noise_version": 1}


def test_weights_in_half_precision_load_as_what_the_network_computes_with(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    half = {name: tensor.half() for name, tensor in weights.items()}
    checkpoint.save(tmp_path / "c", model=half, config=CONFIG, meta={})
    model, _ = checkpoint.load_model(tmp_path / "c")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, half[name].to(tensor.dtype))
