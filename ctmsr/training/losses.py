"""The objectives: consistency training (CT), trajectory alignment, distribution trajectory matching (DTM).

Pure functions of pictures and a perceptual distance; all random draws are made in `objective`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config import check
from ..model.trajectory import trajectory_point

Distance = Callable[[Tensor, Tensor], Tensor]
"""A perceptual distance between two image batches (N, 3, H, W) in [-1, 1] -> (N,): LPIPS-vgg in training."""
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f(x, sigma, lq) -> images of x's shape."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objectives. Defaults are the published run's."""

    lpips_weight: float = 0.5
    """Weight of LPIPS, in CT and as a factor of DTM; more favours texture over fidelity."""
    charbonnier_weight: float = 0.5
    """Weight of the Charbonnier distance in CT; more favours fidelity (PSNR)."""
    lpips_net: Literal["vgg", "alex"] = "vgg"
    """Network of LPIPS in training; alex is far cheaper than vgg, and is the network of the LPIPS score."""
    lpips_crop: float = 1.0
    """Side of the crop that LPIPS compares, as a share of the picture's; 0.5 costs a quarter, 1 is all."""
    lpips_zoom: float = 1.0
    """Largest factor by which the crop for LPIPS is shrunk or enlarged at random; 1 keeps its pixels."""
    hr_target_until: float = 0.0
    """Share of the run during which CT's target is the HR picture at every step; 1 is pure regression."""
    steps: Literal["all", "last"] = "all"
    """Steps of the trajectory to train; last is only the step of inference, and needs hr_target_until=1."""
    step_per_image: bool = False
    """Whether every image draws its own step, instead of one for the whole batch."""
    alignment_weight: float = 0.0
    """Weight of trajectory alignment, times those of LPIPS and Charbonnier; GTASR's is 1."""
    dtm_weight: float = 1.6
    """Weight of DTM beside CT in phase 2, times lpips_weight; more favours realism."""
    dtm_t_min: float = 0.1
    """Lower end of the trajectory positions that DTM compares, as a share of its length."""
    dtm_t_max: float = 0.5
    """Upper end of the trajectory positions that DTM compares, as a share of its length."""

    def __post_init__(self) -> None:
        for name in ("lpips_weight", "charbonnier_weight", "alignment_weight", "dtm_weight"):
            weight = getattr(self, name)
            check(weight >= 0, f"loss.{name} must be at least 0, got {weight}.")
        check(0 < self.lpips_crop <= 1, f"loss.lpips_crop must be in (0, 1], got {self.lpips_crop}.")
        check(1 <= self.lpips_zoom <= 4, f"loss.lpips_zoom must be in [1, 4], got {self.lpips_zoom}.")
        check(
            0 <= self.hr_target_until <= 1,
            f"loss.hr_target_until must be in [0, 1], got {self.hr_target_until}.",
        )
        check(
            self.steps == "all" or self.hr_target_until == 1,
            "with loss.steps=last the target must be the HR picture, as no other step is trained: set "
            f"loss.hr_target_until=1 as well, got {self.hr_target_until}.",
        )
        check(
            0 <= self.dtm_t_min < self.dtm_t_max <= 1,
            f"loss.dtm_t_min and loss.dtm_t_max must satisfy 0 <= min < max <= 1, "
            f"got {self.dtm_t_min} and {self.dtm_t_max}.",
        )


def charbonnier(a: Tensor, b: Tensor) -> Tensor:
    """Mean of sqrt((a - b)^2 + 1e-12) over all elements: a scalar."""
    return torch.sqrt((a - b) ** 2 + 1e-12).mean()


def consistency_loss(pred: Tensor, target: Tensor, lpips: Distance, config: LossConfig) -> dict[str, Tensor]:
    """L_CT = 0.5 mean LPIPS(pred, target) + 0.5 mean Charbonnier(pred, target), arXiv:2503.20349.

    Args:
        pred: f at the noisier point, (N, 3, H, W), with gradient.
        target: f at the cleaner point, same shape, no gradient.
        lpips: Perceptual distance.
        config: Weights.

    Returns:
        Scalars `lpips`, `charbonnier` and `ct_loss`, the objective.
    """
    perceptual, pixel = lpips(pred, target).mean(), charbonnier(pred, target)
    loss = config.lpips_weight * perceptual + config.charbonnier_weight * pixel
    return {"lpips": perceptual, "charbonnier": pixel, "ct_loss": loss}


def alignment_loss(
    sr: Tensor,
    hr: Tensor,
    lq_up: Tensor,
    noise: Tensor,
    *,
    alpha: Tensor,
    sigma: Tensor,
    num_steps: int,
    lpips: Distance,
    config: LossConfig,
) -> Tensor:
    """L_TA = 0.5 (N - 1) [0.5 LPIPS(z_t, x_t) + 0.5 Charbonnier(z_t, x_t)], GTASR, arXiv:2602.24240.

    Compares the trajectory that starts at the prediction o = sr with that of the HR image, at the same t and
    with the same noise: z_t - x_t = (1 - alpha_t)(o - x_0). GTASR sums over t = 1 ... N-1; here the caller
    draws one t uniformly, and the factor N - 1 keeps the expectation. The weights in the brackets are those
    of CT. No network is called, and only `sr` receives a gradient.

    Args:
        sr: o, the CT prediction, (N, 3, H, W), with gradient.
        hr: x_0, same shape.
        lq_up: y_0, the LR images at HR size.
        noise: Standard normal, same shape, independent of CT's.
        alpha: Residual weight of t, (N,).
        sigma: Noise level of t, (N,).
        num_steps: N, the length of the trajectory, at least 2.
        lpips: Perceptual distance.
        config: Weights.

    Returns:
        A scalar.
    """
    z_t = trajectory_point(sr, lq_up, noise, alpha, sigma)
    x_t = trajectory_point(hr, lq_up, noise, alpha, sigma)
    distance = consistency_loss(z_t, x_t, lpips, config)["ct_loss"]
    return config.alignment_weight * 0.5 * (num_steps - 1) * distance


def dtm_range(config: LossConfig, num_steps: int) -> tuple[int, int]:
    """Half-open range of the trajectory steps m that DTM draws from; (1, 2) in the published run.

    Raises:
        ConfigError: The range is empty for a trajectory of `num_steps`.
    """
    low = max(1, math.floor(config.dtm_t_min * (num_steps + 1)))
    high = min(num_steps + 1, math.floor(config.dtm_t_max * (num_steps + 1)))
    enough = math.ceil(100 * (low + 1) / (num_steps + 1)) / 100
    check(
        low < high,
        f"loss.dtm_t_min={config.dtm_t_min} and loss.dtm_t_max={config.dtm_t_max} leave no step to "
        f"compare on a trajectory of {num_steps} steps. Raise dtm_t_max to {enough:.2f} or more.",
    )
    return low, high


def dtm_loss(
    sr: Tensor,
    hr: Tensor,
    lq: Tensor,
    lq_up: Tensor,
    noise: Tensor,
    *,
    alpha: Tensor,
    sigma: Tensor,
    dtm_model: Network,
    lpips: Distance,
    config: LossConfig,
) -> Tensor:
    """L_DTM = 0.5 · 1.6 · mean of w · LPIPS(o, stopgrad(o) - d), arXiv:2503.20349.

    With o = sr, d = stopgrad(g(z_m) - g(x_m)) and w = 1 / mean |o - x_0| per image: the gradient moves o
    along -d, which is score distillation along the network's own trajectory.

    Args:
        sr: o, the CT prediction, (N, 3, H, W), with gradient.
        hr: x_0, same shape.
        lq: LR images, (N, 3, h, w).
        lq_up: lq at HR size.
        noise: Standard normal, one draw for both points.
        alpha: Residual weight of step m, (N,).
        sigma: Noise level of step m, (N,).
        dtm_model: g, the frozen copy.
        lpips: Perceptual distance.
        config: Weights.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        fake = dtm_model(trajectory_point(sr, lq_up, noise, alpha, sigma), sigma, lq)
        real = dtm_model(trajectory_point(hr, lq_up, noise, alpha, sigma), sigma, lq)
        direction = fake - real
        weight = 1 / (sr - hr).abs().mean(dim=(1, 2, 3)).clamp_min(1e-6)  # sr may hit hr exactly
        goal = sr - direction
    return config.lpips_weight * config.dtm_weight * (weight * lpips(sr, goal)).mean()
