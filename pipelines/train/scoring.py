"""Scores a run's checkpoints while it trains: Ray Train's validation function.

Each checkpoint is scored by a Ray task of its own, one at a time and in order, from what is in storage. The
workers never wait for it. The scores are kept in the checkpoint's folder, in MLflow, and beside the
checkpoint in Ray Train's own list.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import torch

from ctmsr.config import from_dict
from ctmsr.errors import UserError
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import Evaluation, score
from ctmsr.model import checkpoint
from ctmsr.model.device import choose_device
from ctmsr.model.inference import for_inference, upscale
from ctmsr.model.network import ConsistencyModel

from ..config.run_config import RunConfig
from ..data.held_out import HeldOut, of_val
from ..data.pictures import Pictures
from ..infra.checkpoints import LPIPS_BY_PICTURE, complete, fetched
from ..infra.exit_status import root_cause
from ..infra.progress import Scores
from ..infra.storage import write_bytes
from ..tracking.metric_logger import MetricLogger
from .reporting import Gauges

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


def score_checkpoint(uri: str, loop: Loop, val: Pictures) -> dict[str, Any]:
    """Scores the EMA weights of a checkpoint on held-out pictures, and stores and reports the scores.

    Returns:
        With "metrics", the means by name, and LPIPS_BY_PICTURE, which become part of the checkpoint's meta.

    Raises:
        UserError: The checkpoint or a picture cannot be read.
    """
    config = from_dict(RunConfig, loop["config"])
    with fetched(uri) as folder:
        model, manifest = checkpoint.load_model(folder)
    if "metrics" in manifest.meta:  # by a task that was lost later, with its node or its run
        return manifest.meta
    evaluation = _evaluated(config, model, val)
    scores = {"metrics": evaluation.means, LPIPS_BY_PICTURE: evaluation.by_picture("lpips")}
    _report(config, loop, manifest.meta["step"], evaluation)
    # Last: a search may stop a trial, and this task with it, as soon as it finds the scores.
    write_bytes(f"{uri}/{checkpoint.SCORES_FILE}", (json.dumps(scores, indent=1) + "\n").encode())
    return scores


def _score_reported(reported: ray.train.Checkpoint, *, loop: Loop, val: Pictures) -> dict[str, Any]:
    """Ray Train's validation function; what fails here is tried again at the end of the run."""
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


def _evaluated(config: RunConfig, model: ConsistencyModel, val: Pictures) -> Evaluation:
    device, train = choose_device(), config.train
    # Beside workers on GPUs, half of the node's cores are a safe guess; beside workers on CPUs, what one has.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2 if train.use_gpu else int(train.cpus_per_worker)))
    held_out = HeldOut(of_val(config.data), val)
    return score(
        partial(
            upscale,
            for_inference(model, device, config.inference),
            sigma_max=config.schedule.sigma_max,
            config=config.inference,
        ),
        held_out.rows(config),
        scale=config.network.scale,
        lpips=load_lpips("alex").to(device),
    )


def _report(config: RunConfig, loop: Loop, step: int, evaluation: Evaluation) -> None:
    values = {f"val_{name}": value for name, value in evaluation.means.items()}
    loop["progress"].put_nowait(Scores(config.name, step, evaluation.means))
    Gauges(config.name).set(values)
    mlflow = MetricLogger(loop["tracking_uri"], loop["run_id"])
    mlflow.log(values, step)
    mlflow.image(np.ascontiguousarray(evaluation.grid_u8), "val", step)
    if lost := mlflow.close():
        loop["progress"].put_nowait(f"warning: MLflow did not accept {'; '.join(lost)}.")
