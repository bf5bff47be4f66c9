"""Mean scores of a network on held-out photographs; metrics on CPUs run in parallel with the device."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ctmsr.degradation.config import DegradationConfig
from ctmsr.degradation.recipe import degrade
from ctmsr.image import center_crop
from ctmsr.metrics.dists import dists, load_dists
from ctmsr.metrics.full_reference import colour_error, lpips_alex, psnr_y, ssim_y
from ctmsr.metrics.niqe import niqe
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import bicubic
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from ctmsr.rng import sample_rng

COLUMNS = ("lpips", "lpips_vgg", "dists", "psnr_y", "ssim_y", "niqe", "colour_error")
"""`lpips` is LPIPS-alex, as the field reports it; `colour_error` is in levels of 255."""


@dataclass(frozen=True)
class Pair:
    """A held-out picture and its degraded version."""

    hr_u8: np.ndarray
    lq_u8: np.ndarray


def held_out_pairs(
    photos: Sequence[np.ndarray], *, size: int, draws: int, scale: int, degradation: DegradationConfig
) -> list[Pair]:
    """The centre of every picture, degraded in `draws` ways that depend only on its number."""
    return [
        Pair(
            hr_u8,
            degrade(hr_u8, scale=scale, config=degradation, rng=sample_rng(draw, 0, str(i), "held out")),
        )
        for i, hr_u8 in enumerate(center_crop(photo, size, name="a photograph") for photo in photos)
        for draw in range(draws)
    ]


class Scorer:
    """The perceptual networks on a device, and processes for the metrics on CPUs."""

    def __init__(self, pairs: Sequence[Pair], device: torch.device, num_processes: int) -> None:
        """Forks processes: create it before anything touches a GPU, and call `warm_up` afterwards."""
        self.pairs, self._device = pairs, device
        self._pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("fork"), _alone)
        self._pool.submit(int).result()  # all processes start with the first task

    def warm_up(self) -> None:
        """Loads the networks."""
        self._alex, self._vgg = (load_lpips(net).to(self._device) for net in ("alex", "vgg"))
        self._dists = load_dists().to(self._device)

    def pictures(self, model: ConsistencyModel, sigma_max: float) -> list[np.ndarray]:
        """The network's output for all pairs, each with its own noise; the network keeps its mode."""
        training = model.training
        model.eval()
        results = [
            upscale(model, pair.lq_u8, sigma_max=sigma_max, seed=number)
            for number, pair in enumerate(self.pairs)
        ]
        model.train(training)
        return results

    def scores(self, pictures: Sequence[np.ndarray]) -> dict[str, float]:
        """Means of COLUMNS over the pairs."""
        rows = self._pool.map(_on_cpu, pictures, [pair.hr_u8 for pair in self.pairs], chunksize=2)
        found: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for sr_u8, pair in zip(pictures, self.pairs, strict=True):
            found["lpips"].append(lpips_alex(sr_u8, pair.hr_u8, self._alex))
            found["lpips_vgg"].append(lpips_alex(sr_u8, pair.hr_u8, self._vgg))
            found["dists"].append(dists(sr_u8, pair.hr_u8, self._dists))
        for row in rows:
            for name, value in row.items():
                found[name].append(value)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def bicubic(self) -> list[np.ndarray]:
        """Scores of bicubic, which a viewer would show without a network."""
        return [bicubic(pair.lq_u8, len(pair.hr_u8) // len(pair.lq_u8)) for pair in self.pairs]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown()


def _alone() -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _on_cpu(sr_u8: np.ndarray, hr_u8: np.ndarray) -> dict[str, float]:
    return {
        "psnr_y": psnr_y(sr_u8, hr_u8),
        "ssim_y": ssim_y(sr_u8, hr_u8),
        "niqe": niqe(sr_u8),
        "colour_error": colour_error(sr_u8, hr_u8),
    }
