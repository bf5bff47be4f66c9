"""Converts the authors' `.pth` to a checkpoint and back."""

from pathlib import Path

from ctmsr.config import to_dict
from ctmsr.errors import CheckpointError
from ctmsr.model import checkpoint
from ctmsr.model.checkpoint import CURRENT_WEIGHTS
from ctmsr.model.network import ConsistencyModel
from ctmsr.model.published import read_pth, write_pth

from ..config.run_config import RunConfig


def import_pth(source: Path, folder: Path, config: RunConfig) -> None:
    """Converts the authors' file: `params_ema` become the EMA weights of a checkpoint, `params` the others.

    Raises:
        CheckpointError: `source` is not a checkpoint of `config.network`, or `folder` is not empty.
    """
    weights = read_pth(source, ConsistencyModel(config.network).state_dict())
    checkpoint.save(
        folder,
        model=weights["params_ema"],
        config=to_dict(config),
        meta={"converted_from": source.name},
        train_state={f"{CURRENT_WEIGHTS}{name}": value for name, value in weights["params"].items()},
    )


def export_pth(folder: Path, target: Path) -> None:
    """Writes a checkpoint in the authors' format; without a training state, its EMA weights serve as both.

    Raises:
        CheckpointError: The checkpoint cannot be read, or `target` exists.
    """
    if target.exists():
        raise CheckpointError(
            f"{target} already exists, and a checkpoint is never overwritten. Choose another name."
        )
    model, manifest = checkpoint.load_model(folder)
    ema = params = model.state_dict()
    if checkpoint.TRAIN_STATE_FILE in manifest.files:
        state = checkpoint.load_train_state(folder)
        params = {name: state[f"{CURRENT_WEIGHTS}{name}"] for name in ema}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_pth(target, params, ema)
