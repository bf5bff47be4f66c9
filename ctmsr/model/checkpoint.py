"""The checkpoint format: a folder of safetensors and JSON, written atomically and verified when read.

    model.safetensors         EMA weights: what is evaluated and released
    train_state.safetensors   what else resuming needs; absent from a released checkpoint
    checkpoint.json           config, meta, and the size and SHA-256 of the files above; written last
    scores.json               what was measured of it later, which then is part of its meta

Nothing is unpickled: reading a checkpoint from an untrusted source runs no code.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import from_dict
from ..errors import CheckpointError, ConfigError
from .network import ConsistencyModel, NetworkConfig

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
TRAIN_STATE_FILE = "train_state.safetensors"
MANIFEST_FILE = "checkpoint.json"
SCORES_FILE = "scores.json"
CURRENT_WEIGHTS = "model."
"""Prefix of the current weights, as opposed to the EMA, among the tensors of TRAIN_STATE_FILE."""


@dataclass(frozen=True)
class Manifest:
    """The verified content of checkpoint.json."""

    config: dict[str, Any]
    """The run's resolved config; `config["network"]` builds the model."""
    meta: dict[str, Any]
    """Step, metrics and origin, as given by the writer."""
    files: dict[str, dict[str, Any]]
    """By file name: `{"bytes": int, "sha256": str}`."""


def save(
    folder: Path,
    *,
    model: Mapping[str, Tensor],
    config: dict[str, Any],
    meta: dict[str, Any],
    train_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint beside `folder` and renames it into place: it exists complete or not at all.

    Args:
        folder: Where to write it; must not exist or be empty. Missing parents are created.
        model: State dict of a ConsistencyModel, on any device.
        config: Resolved config of the run as JSON types, with a "network" section.
        meta: Anything that JSON can hold: step, metrics, commit, data manifest.
        train_state: Flat tensors for resuming, by name.

    Raises:
        CheckpointError: `folder` is not empty.
        OSError: The disk is full or fails; nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} already exists, and a checkpoint is never overwritten. Choose a new folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {MODEL_FILE: model} | ({} if train_state is None else {TRAIN_STATE_FILE: train_state})
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staging = Path(scratch, folder.name)
        staging.mkdir()
        files = {}
        for name, state in tensors.items():
            _write_tensors(state, staging / name)
            files[name] = {"bytes": (staging / name).stat().st_size, "sha256": _sha256(staging / name)}
        manifest = {"format_version": FORMAT_VERSION, "config": config, "meta": meta, "files": files}
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(staging / MANIFEST_FILE)
        _sync(staging)
        os.rename(staging, folder)
    _sync(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """Reads checkpoint.json and checks size and SHA-256 of every file it lists.

    Raises:
        CheckpointError: There is no checkpoint, or it is incomplete, damaged or of a newer format.
    """
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file, not a checkpoint folder. Pickled weights (.pth, .pt, .ckpt) can run code "
            f"when loaded and are never read here. Pass a folder with {MANIFEST_FILE}."
        )
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CheckpointError(f"no checkpoint at {folder}. Check the path.")
    if not (folder / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"checkpoint {folder} is incomplete: {MANIFEST_FILE} is missing, and it is written last. "
            "Use an earlier checkpoint."
        )
    manifest = _parse_manifest(folder)
    for name, expected in manifest.files.items():
        _verify(folder, name, expected)
    return manifest


def load_model(folder: Path, device: str | torch.device = "cpu") -> tuple[ConsistencyModel, Manifest]:
    """Builds the network that the checkpoint's config describes and loads the verified weights into it.

    Args:
        folder: A checkpoint folder.
        device: Where to put the model.

    Returns:
        The model in eval mode, and the manifest.

    Raises:
        CheckpointError: As `read_manifest`; or the config does not load, or the weights do not match it.
    """
    manifest = read_manifest(folder)
    try:
        config = from_dict(NetworkConfig, manifest.config["network"], "network")
    except ConfigError as error:
        raise CheckpointError(
            f"checkpoint {folder} has a config this version does not accept: {error}"
        ) from error
    model = ConsistencyModel(config)
    # A released checkpoint may store its weights in half precision, to save space.
    expected = model.state_dict()
    weights = {
        name: tensor.to(expected[name].dtype)
        if tensor.dtype == torch.float16 and name in expected
        else tensor
        for name, tensor in load_file(folder / MODEL_FILE).items()
    }
    if found := differences(expected, weights):
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckpointError(
            f"checkpoint {folder} is of another shape than its config: {'; '.join(found[:5])}{more}. "
            "Use the config it was trained with."
        )
    model.load_state_dict(weights)
    return model.eval().to(device), manifest


def check_format(name: str, manifest: Mapping[str, Any]) -> None:
    """Checks that this release reads checkpoints with this checkpoint.json.

    Raises:
        CheckpointError: A newer release wrote it.
    """
    if (version := int(manifest["format_version"])) > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {name} has format {version}, and this release reads up to {FORMAT_VERSION}: it was "
            "made by a newer release. Upgrade this one."
        )


def load_train_state(folder: Path) -> dict[str, Tensor]:
    """The verified tensors that were passed to `save` as `train_state`, on the CPU.

    Raises:
        CheckpointError: As `read_manifest`; or the checkpoint was released without a training state.
    """
    if TRAIN_STATE_FILE not in read_manifest(folder).files:
        raise CheckpointError(
            f"checkpoint {folder} holds no training state ({TRAIN_STATE_FILE}): it can be evaluated and "
            "released, not resumed. Use a checkpoint from the run's own folder."
        )
    return load_file(folder / TRAIN_STATE_FILE)


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Descriptions of where two state dicts differ in names, shapes or dtypes, in a stable order."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    extra = [f"{name} is not in the network" for name in sorted(found) if name not in expected]
    common = [(name, found[name], tensor) for name, tensor in expected.items() if name in found]
    misshaped = [
        f"{name} has shape {tuple(got.shape)} instead of {tuple(tensor.shape)}"
        for name, got, tensor in common
        if got.shape != tensor.shape
    ]
    mistyped = [
        f"{name} is {got.dtype} instead of {tensor.dtype}"
        for name, got, tensor in common
        if got.dtype != tensor.dtype
    ]
    return missing + extra + misshaped + mistyped


def _parse_manifest(folder: Path) -> Manifest:
    try:
        data = json.loads((folder / MANIFEST_FILE).read_bytes())
        check_format(str(folder), data)
        config = dict(data["config"])
        # Checkpoints from before there were two versions of the noise mean version 1.
        config["inference"] = {"noise_version": 1} | config.get("inference", {})
        scores = folder / SCORES_FILE
        meta = dict(data["meta"]) | (json.loads(scores.read_bytes()) if scores.is_file() else {})
        manifest = Manifest(config=config, meta=meta, files=dict(data["files"]))
        if "network" not in manifest.config:
            raise ValueError("config has no section network")
        complete = MODEL_FILE in manifest.files and manifest.files.keys() <= {MODEL_FILE, TRAIN_STATE_FILE}
        if not complete or not all({"bytes", "sha256"} <= set(entry) for entry in manifest.files.values()):
            raise ValueError(f"unexpected list of files {manifest.files}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {MANIFEST_FILE} does not read ({error!r}). "
            "Use an earlier checkpoint."
        ) from error
    return manifest


def _verify(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder} is incomplete: {name} is missing. Copy it again.")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {name} has {size} bytes, {MANIFEST_FILE} says "
            f"{expected['bytes']}. Copy it again or use an earlier checkpoint."
        )
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: the SHA-256 of {name} is not the one in {MANIFEST_FILE}. "
            "Copy it again or use an earlier checkpoint."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:  # raised by the library on a full disk
        raise OSError(str(error)) from error
    _sync(path)


def _sync(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
