"""When a run's checkpoints are scored: while it trains, by Ray Train's validation task, or at its end.

Each checkpoint is scored by a Ray task of its own, one at a time and in order, from what is in storage. The
workers never wait for it. The scores are kept in the checkpoint's folder, in MLflow, and beside the
checkpoint in Ray Train's own list. What scores is imported by that task only: Ray Train's controller reads
this module, and no worker starts before it has.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
import ray.train

from ctmsr.config import from_dict
from ctmsr.errors import UserError

from ..config.run_config import RunConfig
from ..data.pictures import Pictures
from ..infra.checkpoints import complete
from ..infra.exit_status import root_cause

RANKED_BY = "minus_lpips"
"""The metric by which Ray Train ranks checkpoints; those without scores are the lowest, as Ray has it."""
Loop = Mapping[str, Any]
"""What `train_loop_per_worker` gets."""


def validation(loop: Loop, val: Pictures) -> ray.train.ValidationConfig:
    """How Ray Train scores the checkpoints of a run: on a GPU if there is one left for it, else on CPUs.

    Args:
        loop: As for `train_loop_per_worker`.
        val: The pictures of data.val_uri.
    """
    score_reported = partial(_score_reported, loop=loop, val=val)
    return ray.train.ValidationConfig(score_reported, ray_remote_kwargs=_resources(loop))


def score_the_rest(loop: Loop, val: Pictures) -> None:
    """Scores the checkpoints of a finished run that have no scores, but for those made as a node was lost.

    There are such if a picture could not be read for a while, or the run was killed in between.

    Raises:
        UserError: One cannot be scored; the message is the cause.
    """
    from .scoring import score_checkpoint

    config = from_dict(RunConfig, loop["config"])
    every, total = config.train.checkpoint_every_steps, config.optim.total_steps
    task = ray.remote(score_checkpoint).options(**_resources(loop))
    for one in list(complete(config.run_uri)):
        if "metrics" in one.meta or (one.step % every and one.step != total):
            continue
        try:
            ray.get(task.remote(one.uri, loop, val))
        except ray.exceptions.RayError as error:
            raise UserError(f"the checkpoint {one.uri} cannot be scored. {root_cause(error)}") from error


def _score_reported(reported: ray.train.Checkpoint, *, loop: Loop, val: Pictures) -> dict[str, Any]:
    """Ray Train's validation function; what fails here is tried again at the end of the run."""
    from .scoring import score_checkpoint

    folder = reported.path.rstrip("/").rpartition("/")[2]
    config = from_dict(RunConfig, loop["config"])
    try:
        metrics: dict[str, float] = score_checkpoint(f"{config.run_uri}/{folder}", loop, val)["metrics"]
    except UserError as error:
        loop["progress"].put_nowait(f"warning: {config.name}: {folder} is not scored. {error}")
        raise
    return metrics | {RANKED_BY: -metrics["lpips"]}


def _resources(loop: Loop) -> dict[str, Any]:
    """A spare GPU, or no reservation at all: a core reserved here could be the one that the stream needs."""
    train = from_dict(RunConfig, loop["config"]).train
    has_spare = train.use_gpu and ray.cluster_resources().get("GPU", 0) > train.num_workers
    return {"num_cpus": 0, "num_gpus": int(has_spare)}
