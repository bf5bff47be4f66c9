"""What must hold after a fault drill; each function returns the violations, in words."""

from collections import defaultdict
from pathlib import Path, PurePosixPath

import torch

from ctmsr.errors import CheckpointError, DataError
from ctmsr.model import checkpoint
from pipelines.infra.checkpoints import Stored, fetched, newest
from pipelines.infra.storage import list_sizes
from tests.support.training_command import Point


def other_state(expected: Stored, found: Stored) -> list[str]:
    """Tensors of EMA, weights or optimizer state that differ between two runs in any bit."""
    with fetched(expected.uri) as one, fetched(found.uri) as other:
        if checkpoint.read_manifest(one).files == checkpoint.read_manifest(other).files:
            return []
        before, after = (_tensors(folder) for folder in (one, other))
    names = [name for name in before | after if name not in before or name not in after]
    names += [name for name in before if name in after and not torch.equal(before[name], after[name])]
    return [
        f"{len(names)} of {len(before)} tensors differ from the reference: {', '.join(sorted(names)[:5])}"
    ]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = checkpoint.load_model(folder)
    return {f"ema.{name}": value for name, value in model.state_dict().items()} | checkpoint.load_train_state(
        folder
    )


def lost_steps(expected: list[Point], found: list[Point], total_steps: int) -> list[str]:
    """Steps whose loss is missing in MLflow, or was ever logged with another value than the reference's."""
    reference = {point.step: point.loss for point in expected}
    losses: defaultdict[int, set[float]] = defaultdict(set)
    for point in found:
        losses[point.step].add(point.loss)
    wrong = []
    for step in range(1, total_steps + 1):
        if step not in reference or losses[step] != {reference[step]}:
            wrong.append(
                f"step {step} has losses {sorted(losses[step])}, the reference {reference.get(step)}"
            )
    return wrong


def unreadable(run_uri: str) -> list[str]:
    """Checkpoints of a run that look complete but whose files do not match their manifest."""
    wrong = []
    for path in list_sizes(run_uri):
        if path.name == checkpoint.MANIFEST_FILE and path.parent != PurePosixPath("."):
            uri = f"{run_uri}/{path.parent}"
            try:
                with fetched(uri) as folder:
                    checkpoint.read_manifest(folder)
            except (CheckpointError, DataError) as error:
                wrong.append(str(error))
    return wrong


def unreadable_newest(run_uri: str) -> list[str]:
    """Like `unreadable`, for the checkpoint that a restart would resume from, while the run goes on."""
    found = newest(run_uri)
    if found is None:
        return []
    try:
        with fetched(found.uri) as folder:
            checkpoint.read_manifest(folder)
    except (CheckpointError, DataError) as error:
        after = newest(run_uri)
        is_replaced = after is not None and after.step > found.step  # and the old one perhaps deleted
        return [] if is_replaced else [str(error)]
    return []
