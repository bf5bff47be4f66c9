"""Scores a checkpoint on a test set and writes the report."""

import csv
import io
import json
import logging
from collections.abc import Sequence
from functools import partial

import ray
from torch import Tensor

from ctmsr.config import check, from_dict, override
from ctmsr.errors import TrackingError, UserError
from ctmsr.image import encode_png
from ctmsr.metrics.dists import load_dists
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import OWN_METRICS, Evaluation, score
from ctmsr.model import checkpoint
from ctmsr.model.device import choose_device
from ctmsr.model.inference import for_inference, upscale
from ctmsr.model.network import ConsistencyModel

from ..config.run_config import RunConfig
from ..data.held_out import HeldOut
from ..infra.checkpoints import complete, fetched
from ..infra.exit_status import root_cause
from ..infra.storage import open_uri, write_bytes
from ..tracking.evaluations import PictureSet, log_evaluation
from ..tracking.runs import connect, find_run, is_there, preflight, tracking_errors

logger = logging.getLogger(__name__)


def evaluate(
    config: RunConfig,
    checkpoint_uri: str,
    held_out: HeldOut,
    overrides: Sequence[str] = (),
    also: Sequence[str] = (),
    device: str | None = None,
) -> Evaluation:
    """Scores a checkpoint on a test set, in one Ray task that holds the network.

    Args:
        config: Where and on what to evaluate. The model keeps the settings it was trained with.
        checkpoint_uri: The checkpoint.
        held_out: The test set.
        overrides: KEY=VALUE settings that replace those of the checkpoint, such as inference.tile=128.
        also: Names of metrics besides OWN_METRICS.
        device: Where to compute, one of DEVICES; None for a GPU if `config.train.use_gpu`, else the best one.

    Raises:
        UserError: The checkpoint is missing, damaged or of another shape, or a picture cannot be read.
    """
    with fetched(checkpoint_uri) as folder:
        model, manifest = checkpoint.load_model(folder)
    trained = from_dict(RunConfig, override(manifest.config, overrides))
    check(
        config.data.eval_crop_size % trained.network.scale == 0,
        f"data.eval_crop_size ({config.data.eval_crop_size}) must be a multiple of the checkpoint's scale "
        f"({trained.network.scale}).",
    )
    needs_gpu = device in ("cuda", "rocm") if device else config.train.use_gpu
    task = _evaluate_remotely.options(num_cpus=config.train.cpus_per_worker, num_gpus=int(needs_gpu))
    try:
        return ray.get(task.remote(trained, held_out, model.state_dict(), [*OWN_METRICS, *also], device))
    except ray.exceptions.RayError as error:
        raise UserError(f"evaluation failed. {root_cause(error)}") from error


@ray.remote
def _evaluate_remotely(
    trained: RunConfig,
    held_out: HeldOut,
    weights: dict[str, Tensor],
    metrics: Sequence[str],
    device_name: str | None,
) -> Evaluation:
    device = choose_device(device_name)
    model = ConsistencyModel(trained.network)
    model.load_state_dict(weights)
    model = for_inference(model, device, trained.inference)
    return score(
        partial(upscale, model, sigma_max=trained.schedule.sigma_max, config=trained.inference),
        held_out.rows(trained),
        scale=trained.network.scale,
        lpips=load_lpips("alex").to(device),
        dists=load_dists().to(device),
        crop_border=held_out.data.eval_crop_border,
        metrics=metrics,
    )


def write_report(config: RunConfig, checkpoint_uri: str, held_out: HeldOut, evaluation: Evaluation) -> str:
    """Writes means, per-picture scores and a grid next to the run's checkpoints; returns the folder."""
    folder = f"{config.run_uri}/evaluation"
    report = {"checkpoint": checkpoint_uri, "protocol": held_out.protocol, "means": evaluation.means}
    write_bytes(f"{folder}/scores.json", (json.dumps(report, indent=1) + "\n").encode())
    lines = io.StringIO()
    writer = csv.DictWriter(lines, ["key", *evaluation.means])
    writer.writeheader()
    writer.writerows(evaluation.rows)
    write_bytes(f"{folder}/scores.csv", lines.getvalue().encode())
    write_bytes(f"{folder}/grid.png", encode_png(evaluation.grid_u8))
    return folder


def log_scores(config: RunConfig, checkpoint_uri: str, held_out: HeldOut, evaluation: Evaluation) -> None:
    """Adds the scores to the MLflow run that trained the checkpoint, if there is one at config.tracking_uri.

    The report is complete without it: if MLflow fails, that is only a warning.
    """
    folder, _, name = checkpoint_uri.rstrip("/").rpartition("/")
    if not is_there(config.tracking_uri) or not folder:
        return
    stored = next((one for one in complete(folder) if one.uri.endswith(f"/{name}")), None)
    if stored is None:  # it is no run's: converted, or exported
        return
    storage = folder if "://" in folder else open_uri(folder)[1]
    uri = config.data.test_lq_uri or config.data.test_uri
    pictures = PictureSet(uri, held_out.version(from_dict(RunConfig, stored.config)), "evaluation")
    try:
        tracking_uri = preflight(config.tracking_uri)
        with tracking_errors("the scores are not in MLflow"):
            client = connect(tracking_uri)
            experiment = client.get_experiment_by_name(config.experiment)
            run_id = (
                find_run(tracking_uri, experiment.experiment_id, {"storage": storage}) if experiment else None
            )
            if run_id:
                log_evaluation(client, run_id, evaluation, pictures, step=stored.step, prefix="test_")
    except TrackingError as error:
        logger.warning("%s", error)
