"""Evaluate a checkpoint on held-out pictures, against bicubic: `python -m pipelines.evaluate --help`."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import ray
import torch
from torch import Tensor

from ctmsr import checkpoint
from ctmsr.config import check, from_dict, override
from ctmsr.errors import UserError
from ctmsr.image import encode_png, to_tensor, to_u8, upsample
from ctmsr.inference import InferenceConfig, upscale
from ctmsr.metrics import lpips_alex, psnr_y, ssim_y
from ctmsr.network import ConsistencyModel
from ctmsr.niqe import MIN_SIDE_PX, niqe
from ctmsr.perceptual import Lpips, load_lpips

from .checkpoints import fetched, find
from .cli import config_parser, print_config, resolve
from .cluster import ray_cluster
from .command import root_cause, run
from .config import DataConfig, RunConfig
from .data import check_images, val_samples
from .pairs import check_pairs, whole_pictures
from .pictures import Pictures, find_pictures
from .storage import ImageRef, list_images, write_bytes

EXAMPLES = """\
  the newest checkpoint of a run, on data.test_uri:
    python -m pipelines.evaluate --set name=first --set data.test_uri=photos/test
  any checkpoint, on pairs of whole pictures as benchmarks have them:
    python -m pipelines.evaluate --checkpoint s3://bucket/runs/first/checkpoint_... \\
        --set data.test_uri=RealSR/HR --set data.test_lq_uri=RealSR/LR
  on pictures without a reference, by NIQE, with other tiles than the checkpoint's:
    python -m pipelines.evaluate --set name=first --set data.test_uri= --set data.test_lq_uri=RealSet65 \\
        --set inference.tile=128"""

MAX_GRID_ROWS = 8
GRID_PX = 256
"""Largest side of a picture in the grid: the middle of larger ones is shown."""
METRICS = {"psnr_y": "PSNR-Y dB", "ssim_y": "SSIM-Y", "lpips": "LPIPS", "niqe": "NIQE"}


@dataclass(frozen=True)
class Evaluation:
    """Scores of ours and of bicubic on each picture, and what they look like."""

    rows: list[dict[str, Any]]
    """A picture a row: key; psnr_y, ssim_y, lpips, niqe as far as it has them; the same as bicubic_*."""
    grid_u8: np.ndarray
    """LR | bicubic | ours | HR, a picture a row, uint8 HWC."""

    @property
    def means(self) -> dict[str, float]:
        """Mean of every score over the pictures that have it."""
        names = {name: None for row in self.rows for name in row if name != "key"}  # in order
        return {name: float(np.mean([row[name] for row in self.rows if name in row])) for name in names}


@dataclass(frozen=True)
class HeldOut:
    """The pictures of an evaluation, listed and checked before anything expensive starts."""

    data: DataConfig
    pictures: Pictures | None
    """Of data.test_uri, where they are degraded."""
    refs: tuple[ImageRef, ...] = ()
    """Below data.test_uri, where they are references of `lq_refs`."""
    lq_refs: tuple[ImageRef, ...] = ()
    """Below data.test_lq_uri."""

    def rows(self, trained: RunConfig) -> Iterable[Mapping[str, Any]]:
        """Key, lq and hr of every sample, for a model of the config `trained`."""
        scale = trained.network.scale
        if self.pictures is None:
            return whole_pictures(
                self.data.test_lq_uri, self.lq_refs, self.data.test_uri, self.refs, scale=scale
            )
        return val_samples(
            self.pictures,
            hr_crop_size=self.data.eval_crop_size,
            num_draws=self.data.eval_draws,
            scale=scale,
            degradation=trained.degradation,
        ).iter_rows()

    @property
    def protocol(self) -> str:
        """What the scores mean, in a line."""
        d = self.data
        if self.lq_refs:
            what = f"whole pictures of {d.test_lq_uri}" + (f" against {d.test_uri}" if self.refs else "")
        else:
            what = f"middle {d.eval_crop_size} px of {d.test_uri}, degraded in {d.eval_draws} ways"
        return (
            f"{what}; PSNR, SSIM and NIQE on Y less {d.eval_crop_border} px of border; LPIPS-alex 0.1 on RGB"
        )


def find_held_out(data: DataConfig) -> HeldOut:
    """Lists what data.test_uri and data.test_lq_uri name.

    Raises:
        DataError: There is no picture, one cannot be read, or pairs do not match.
    """
    check(
        bool(data.test_uri or data.test_lq_uri),
        "set data.test_uri, data.test_lq_uri or both: nothing to test.",
    )
    if not data.test_lq_uri:
        pictures = find_pictures(data.test_uri)
        check_images(pictures, hr_crop_size=data.eval_crop_size)
        return HeldOut(data, pictures)
    refs = list_images(data.test_uri) if data.test_uri else ()
    lq_refs = list_images(data.test_lq_uri)
    if refs:
        check_pairs(data.test_lq_uri, lq_refs, data.test_uri, refs)
    return HeldOut(data, None, refs, lq_refs)


def score(
    model: ConsistencyModel,
    rows: Iterable[Mapping[str, Any]],
    *,
    sigma_max: float,
    inference: InferenceConfig,
    lpips: Lpips,
    crop_border: int = 0,
    with_niqe: bool = False,
) -> Evaluation:
    """Upscales every row's "lq" in one step, with noise seed 0, and compares with its "hr".

    Args:
        model: In eval mode.
        rows: With "key", "hr" and "lq" (uint8 HWC); "hr" is None where there is no reference.
        sigma_max: Noise level at the LR end of the model's trajectory.
        inference: Tiles and colour.
        lpips: LPIPS-alex, on any device.
        crop_border: Pixels cut from every side for PSNR, SSIM and NIQE.
        with_niqe: Adds NIQE for pictures that are large enough.
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
            if hr_u8 is not None:
                scores[f"{prefix}psnr_y"] = psnr_y(sr_u8, hr_u8, crop_border=crop_border)
                scores[f"{prefix}ssim_y"] = ssim_y(sr_u8, hr_u8, crop_border=crop_border)
                scores[f"{prefix}lpips"] = lpips_alex(sr_u8, hr_u8, lpips)
            if with_niqe and min(sr_u8.shape[:2]) >= MIN_SIDE_PX + 2 * crop_border:
                scores[f"{prefix}niqe"] = niqe(sr_u8, crop_border=crop_border)
        table.append(scores)
        if len(pictures) < MAX_GRID_ROWS:
            pictures.append(side_by_side(hr_u8, lq_u8, images[""]))
    return Evaluation(table, stack(pictures))


def bicubic(lq_u8: np.ndarray, scale: int) -> np.ndarray:
    """The baseline: uint8 HWC, `scale` times as large."""
    return to_u8(upsample(to_tensor(lq_u8[None]), scale))[0]


def side_by_side(hr_u8: np.ndarray | None, lq_u8: np.ndarray, sr_u8: np.ndarray) -> np.ndarray:
    """LR | bicubic | ours | HR, if there is one, at HR's size: the middle GRID_PX of each."""
    height, width = sr_u8.shape[:2]
    blocky = cv2.resize(lq_u8, (width, height), interpolation=cv2.INTER_NEAREST)
    panels = [blocky, bicubic(lq_u8, height // len(lq_u8)), sr_u8, *([] if hr_u8 is None else [hr_u8])]
    top, left = (max(0, side - GRID_PX) // 2 for side in (height, width))
    return np.hstack([panel[top : top + GRID_PX, left : left + GRID_PX] for panel in panels])


def stack(rows_u8: list[np.ndarray]) -> np.ndarray:
    """Pictures of any width below each other, on black."""
    width = max(row.shape[1] for row in rows_u8)
    return np.vstack([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows_u8])


def evaluate(
    config: RunConfig, checkpoint_uri: str, held_out: HeldOut, overrides: Sequence[str] = ()
) -> Evaluation:
    """Scores a checkpoint on a test set, in one Ray task that holds the network.

    Args:
        config: Where and on what to evaluate. The model's own settings are those it was trained with.
        checkpoint_uri: The checkpoint.
        held_out: The test set.
        overrides: KEY=VALUE settings laid over those of the checkpoint, such as inference.tile=128.

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
    task = _evaluate_remotely.options(
        num_cpus=config.train.cpus_per_worker, num_gpus=int(config.train.use_gpu)
    )
    try:
        return ray.get(task.remote(trained, held_out, model.state_dict()))
    except ray.exceptions.RayError as error:
        raise UserError(f"evaluation failed. {root_cause(error)}") from error


@ray.remote
def _evaluate_remotely(trained: RunConfig, held_out: HeldOut, weights: dict[str, Tensor]) -> Evaluation:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ConsistencyModel(trained.network)
    model.load_state_dict(weights)
    return score(
        model.eval().to(device),
        held_out.rows(trained),
        sigma_max=trained.schedule.sigma_max,
        inference=trained.inference,
        lpips=load_lpips("alex").to(device),
        crop_border=held_out.data.eval_crop_border,
        with_niqe=True,
    )


def table(evaluation: Evaluation) -> str:
    """The mean scores of ours and bicubic as lines of text."""
    means = evaluation.means
    metrics = [name for name in METRICS if name in means]
    header = "".join(f"{METRICS[name]:>11}" for name in metrics)
    lines = [f"{'':10}{header}   mean of {len(evaluation.rows)} held-out samples"]
    for name, prefix in (("bicubic", "bicubic_"), ("ours", "")):
        scores = "".join(
            f"{means[prefix + metric]:>11.{2 if metric == 'psnr_y' else 4}f}" for metric in metrics
        )
        lines.append(f"{name:10}{scores}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("evaluate", __doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", metavar="URI", help="default: the newest of the run")
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    checkpoint_uri = arguments.checkpoint or find(config.run_uri).uri
    held_out = find_held_out(config.data)
    overrides = [text for text in arguments.overrides if text.startswith("inference.")]
    with ray_cluster():
        evaluation = evaluate(config, checkpoint_uri, held_out, overrides)
    print(table(evaluation))
    print(f"protocol: {held_out.protocol}")
    print(f"written: {write_report(config, checkpoint_uri, held_out, evaluation)}")
    return 0


def write_report(config: RunConfig, checkpoint_uri: str, held_out: HeldOut, evaluation: Evaluation) -> str:
    """Writes means, the table of pictures and their grid beside the run's checkpoints; returns the folder."""
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


if __name__ == "__main__":
    run(main)
