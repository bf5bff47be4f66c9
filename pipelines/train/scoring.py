"""Scores a checkpoint from what is in storage; runs in a Ray task of its own, on any node."""

import json
import os
from functools import partial
from typing import Any

import numpy as np
import torch

from ctmsr.config import from_dict
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import Evaluation, score
from ctmsr.model import checkpoint
from ctmsr.model.device import choose_device
from ctmsr.model.inference import for_inference, upscale
from ctmsr.model.network import ConsistencyModel

from ..config.run_config import RunConfig
from ..data.held_out import HeldOut, of_val
from ..data.pictures import Pictures
from ..infra.checkpoints import LPIPS_BY_PICTURE, fetched
from ..infra.progress import Scores
from ..infra.storage import write_bytes
from ..tracking.metric_logger import MetricLogger
from .reporting import Gauges
from .validation import Loop


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
