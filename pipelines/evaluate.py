"""Evaluate a checkpoint on held-out pictures, against bicubic: `python -m pipelines.evaluate --help`."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import ray
import torch
from torch import Tensor

from ctmsr import checkpoint
from ctmsr.config import check, from_dict
from ctmsr.errors import CheckpointError, UserError
from ctmsr.image import encode_png, to_tensor, to_u8, upsample
from ctmsr.inference import InferenceConfig, upscale
from ctmsr.metrics import lpips_alex, psnr_y, ssim_y
from ctmsr.network import ConsistencyModel
from ctmsr.perceptual import Lpips, load_lpips

from .cli import config_parser, print_config, resolve
from .cluster import ray_cluster
from .command import root_cause, run
from .config import RunConfig
from .data import DataConfig, check_images, val_samples
from .storage import ImageRef, download_folder, list_images, newest_checkpoint, write_bytes

EXAMPLES = """\
  the newest checkpoint of a run, on data.test_uri:
    python -m pipelines.evaluate --set name=first --set data.test_uri=photos/test
  any checkpoint:
    python -m pipelines.evaluate --checkpoint s3://bucket/runs/first/checkpoint_... --set data.test_uri=..."""

MAX_GRID_ROWS = 8


@dataclass(frozen=True)
class Evaluation:
    """Scores of ours and of bicubic on each picture, and what they look like."""

    rows: list[dict[str, Any]]
    """A picture a row: key, then psnr_y, ssim_y, lpips and the same as bicubic_*."""
    grid_u8: np.ndarray
    """LR | bicubic | ours | HR, a picture a row, uint8 HWC."""

    @property
    def means(self) -> dict[str, float]:
        """Mean of every score over the pictures."""
        return {
            name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0] if name != "key"
        }


def score(
    model: ConsistencyModel,
    rows: Iterable[Mapping[str, Any]],
    *,
    sigma_max: float,
    inference: InferenceConfig,
    lpips: Lpips,
) -> Evaluation:
    """Upscales every row's "lq" in one step, with noise seed 0, and compares with its "hr".

    Args:
        model: In eval mode.
        rows: With "key", "hr" and "lq" (uint8 HWC), as `data.val_samples` gives them.
        sigma_max: Noise level at the LR end of the model's trajectory.
        inference: Tiles and colour.
        lpips: LPIPS-alex, on any device.
    """
    table: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    for row in rows:
        hr_u8, lq_u8 = row["hr"], row["lq"]
        images = {
            "": upscale(model, lq_u8, sigma_max=sigma_max, config=inference),
            "bicubic_": bicubic(lq_u8, model.config.scale),
        }
        scores: dict[str, Any] = {"key": str(row["key"])}
        for prefix, sr_u8 in images.items():
            scores[f"{prefix}psnr_y"] = psnr_y(sr_u8, hr_u8)
            scores[f"{prefix}ssim_y"] = ssim_y(sr_u8, hr_u8)
            scores[f"{prefix}lpips"] = lpips_alex(sr_u8, hr_u8, lpips)
        table.append(scores)
        if len(pictures) < MAX_GRID_ROWS:
            pictures.append(side_by_side(hr_u8, lq_u8, images[""]))
    return Evaluation(table, np.vstack(pictures))


def bicubic(lq_u8: np.ndarray, scale: int) -> np.ndarray:
    """The baseline: uint8 HWC, `scale` times as large."""
    return to_u8(upsample(to_tensor(lq_u8[None]), scale))[0]


def side_by_side(hr_u8: np.ndarray, lq_u8: np.ndarray, sr_u8: np.ndarray) -> np.ndarray:
    """LR | bicubic | ours | HR, all at the size of HR."""
    height, width = hr_u8.shape[:2]
    blocky = cv2.resize(lq_u8, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.hstack([blocky, bicubic(lq_u8, height // len(lq_u8)), sr_u8, hr_u8])


def evaluate(config: RunConfig, checkpoint_uri: str, refs: tuple[ImageRef, ...]) -> Evaluation:
    """Scores a checkpoint on `refs` under data.test_uri, in one Ray task that holds the network.

    Raises:
        UserError: The checkpoint is missing, damaged or of another shape, or a picture cannot be read.
    """
    with local_checkpoint(checkpoint_uri) as folder:
        model, manifest = checkpoint.load_model(folder)
    trained = from_dict(RunConfig, manifest.config)
    check(
        config.data.eval_crop_size % trained.network.scale == 0,
        f"data.eval_crop_size ({config.data.eval_crop_size}) must be a multiple of the checkpoint's scale "
        f"({trained.network.scale}).",
    )
    task = _evaluate_remotely.options(
        num_cpus=config.train.cpus_per_worker, num_gpus=int(config.train.use_gpu)
    )
    try:
        return ray.get(task.remote(trained, config.data, refs, model.state_dict()))
    except ray.exceptions.RayError as error:
        raise UserError(f"evaluation failed. {root_cause(error)}") from error


@ray.remote
def _evaluate_remotely(
    trained: RunConfig, data: DataConfig, refs: tuple[ImageRef, ...], weights: dict[str, Tensor]
) -> Evaluation:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ConsistencyModel(trained.network)
    model.load_state_dict(weights)
    samples = val_samples(
        data.test_uri,
        refs,
        hr_crop_size=data.eval_crop_size,
        num_draws=data.eval_draws,
        scale=trained.network.scale,
        degradation=trained.degradation,
    )
    lpips = load_lpips("alex").to(device)
    return score(
        model.eval().to(device),
        samples.iter_rows(),
        sigma_max=trained.schedule.sigma_max,
        inference=trained.inference,
        lpips=lpips,
    )


@contextmanager
def local_checkpoint(uri: str) -> Iterator[Path]:
    """A copy of the checkpoint at `uri` on this machine, for the length of a `with` block.

    Raises:
        DataError: It cannot be fetched.
        CheckpointError: What the block raises, with `uri` in place of the copy.
    """
    with tempfile.TemporaryDirectory() as scratch:
        download_folder(uri, Path(scratch))
        try:
            yield Path(scratch)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(scratch, uri)) from error


def find_checkpoint(config: RunConfig) -> str:
    """URI of the newest complete checkpoint of the run.

    Raises:
        CheckpointError: The run has none.
    """
    found = newest_checkpoint(config.run_uri)
    if found is None:
        raise CheckpointError(
            f"there is no complete checkpoint under {config.run_uri}. Train first, or set name, storage_uri."
        )
    return found


def table(evaluation: Evaluation) -> str:
    """The mean scores of ours and bicubic as lines of text."""
    means = evaluation.means
    lines = [
        f"{'':10}{'PSNR-Y dB':>10}{'SSIM-Y':>9}{'LPIPS':>9}   mean of {len(evaluation.rows)} held-out samples"
    ]
    for name, prefix in (("bicubic", "bicubic_"), ("ours", "")):
        psnr, ssim, lpips = (means[f"{prefix}{metric}"] for metric in ("psnr_y", "ssim_y", "lpips"))
        lines.append(f"{name:10}{psnr:>10.2f}{ssim:>9.4f}{lpips:>9.4f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("evaluate", __doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", metavar="URI", help="default: the newest of the run")
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    checkpoint_uri = arguments.checkpoint or find_checkpoint(config)
    refs = list_images(config.data.test_uri)
    check_images(config.data.test_uri, refs, hr_crop_size=config.data.eval_crop_size)
    with ray_cluster():
        evaluation = evaluate(config, checkpoint_uri, refs)
    print(table(evaluation))
    print(f"written: {write_report(config, checkpoint_uri, evaluation)}")
    return 0


def write_report(config: RunConfig, checkpoint_uri: str, evaluation: Evaluation) -> str:
    """Writes scores and the picture grid beside the run's checkpoints; returns the grid's URI."""
    report = {"checkpoint": checkpoint_uri, "data": config.data.test_uri, "means": evaluation.means}
    text = json.dumps(report | {"pictures": evaluation.rows}, indent=1)
    write_bytes(f"{config.run_uri}/evaluation/scores.json", text.encode())
    grid_uri = f"{config.run_uri}/evaluation/grid.png"
    write_bytes(grid_uri, encode_png(evaluation.grid_u8))
    return grid_uri


if __name__ == "__main__":
    run(main)
