"""Scores registered models on one pinned set of pictures: what the gate compares."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from ctmsr.config import to_dict
from ctmsr.errors import UserError
from ctmsr.metrics import lpips_alex, psnr_y, ssim_y
from ctmsr.perceptual import load_lpips

from .cluster import check_gpus
from .command import root_cause
from .config import RunConfig
from .evaluate import MAX_GRID_ROWS, Evaluation, HeldOut, bicubic, find_held_out, side_by_side, stack
from .registry import load_from


@dataclass(frozen=True)
class Exam:
    """The pictures of data.val_uri, cropped and degraded alike for every model that takes it.

    The degradation is that of `config`, not what a model was trained with: all see the same LR pictures.
    """

    config: RunConfig
    held_out: HeldOut

    @property
    def set_version(self) -> str:
        """Hash of the pictures, and of how they are cropped and degraded."""
        data, pictures = self.config.data, self.held_out.pictures
        assert pictures is not None
        parts = {
            "pictures": pictures.version,
            "crop": [data.eval_crop_size, data.eval_draws, data.eval_crop_border],
            "scale": self.config.network.scale,
            "degradation": to_dict(self.config.degradation),
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def protocol(self) -> str:
        """What the scores mean, in a line."""
        return self.held_out.protocol

    def take(self, tracking_uri: str, sources: Sequence[str]) -> list[Evaluation]:
        """Scores models by their own code, each in one Ray task.

        Args:
            tracking_uri: From `tracking.preflight`.
            sources: URIs of the models' files.

        Raises:
            UserError: A model does not load or is of another scale, or a picture cannot be read.
        """
        train = self.config.train
        task = _take_remotely.options(num_cpus=train.cpus_per_worker, num_gpus=int(train.use_gpu))
        try:
            return ray.get([task.remote(self, tracking_uri, source) for source in sources])
        except ray.exceptions.RayError as error:
            raise UserError(f"the comparison with the champion failed. {root_cause(error)}") from error


def find_exam(config: RunConfig) -> Exam:
    """Lists and checks the pictures of data.val_uri, before anything expensive starts.

    Raises:
        UserError: There is no picture, one cannot be read, or there is no GPU where one is asked for.
    """
    check_gpus(replace(config.train, num_workers=1, min_workers=0))
    return Exam(config, find_held_out(replace(config.data, test_uri=config.data.val_uri, test_lq_uri="")))


@ray.remote
def _take_remotely(exam: Exam, tracking_uri: str, source: str) -> Evaluation:
    model = load_from(tracking_uri, source)
    lpips = load_lpips("alex").to("cuda" if torch.cuda.is_available() else "cpu")
    crop_border, scale = exam.config.data.eval_crop_border, exam.config.network.scale
    rows: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    for row in exam.held_out.rows(exam.config):
        hr_u8, lq_u8 = row["hr"], row["lq"]
        scores: dict[str, Any] = {"key": str(row["key"])}
        images = {"": np.asarray(model.predict(lq_u8[None]))[0], "bicubic_": bicubic(lq_u8, scale)}
        for prefix, sr_u8 in images.items():
            scores[f"{prefix}psnr_y"] = psnr_y(sr_u8, hr_u8, crop_border=crop_border)
            scores[f"{prefix}ssim_y"] = ssim_y(sr_u8, hr_u8, crop_border=crop_border)
            scores[f"{prefix}lpips"] = lpips_alex(sr_u8, hr_u8, lpips)
        rows.append(scores)
        if len(pictures) < MAX_GRID_ROWS:
            pictures.append(side_by_side(hr_u8, lq_u8, images[""]))
    return Evaluation(rows, stack(pictures))
