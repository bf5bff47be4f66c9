"""The authors' `.pth`: two state dicts of one network, `params` and `params_ema`, in torch's own container.

The published network and ours use the same tensor names, so nothing is renamed.
"""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import differences

KEYS = ("params", "params_ema")


def read_pth(path: Path, expected: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a published checkpoint. Only tensors are read, never code.

    Args:
        path: The `.pth` file.
        expected: State dict of the network that the file should contain.

    Returns:
        A state dict for each of KEYS, in the file's dtypes.

    Raises:
        CheckpointError: The file is missing or damaged, contains anything but tensors, or is of another
            network; the message lists what is missing, extra or of another shape or dtype.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}. Check the path.")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a checkpoint, or not a complete one, written by torch.save. Download it again."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, which could run code when loaded, and is refused. "
            "Get the file from its authors."
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error).splitlines()[0]} Download it again."
        ) from error
    if not isinstance(content, dict) or content.keys() != set(KEYS):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} must hold the keys {' and '.join(KEYS)}, but holds {found[:200]}.")
    for key, weights in content.items():
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise CheckpointError(f"{key} of {path} is not a state dict of tensors.")
        if unlike := differences(expected, weights):
            raise CheckpointError(
                f"{key} of {path} is of another network, {len(unlike)} entries differ: "
                f"{'; '.join(unlike[:5])}{' ...' if len(unlike) > 5 else ''}. "
                "Set the network that it was trained with: --set network.KEY=VALUE."
            )
    return {key: dict(content[key]) for key in KEYS}


def write_pth(path: Path, params: Mapping[str, Tensor], params_ema: Mapping[str, Tensor]) -> None:
    """Writes the two state dicts in the authors' format, atomically."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"params": dict(params), "params_ema": dict(params_ema)}, file)
        os.rename(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
