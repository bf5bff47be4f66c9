"""Noise and residual schedules of the discretised trajectory, and the curriculum of its length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import check


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The PF-ODE's discretisation: what a noise-schedule search varies. Defaults are the published run's."""

    sigma_max: float = 1.0
    """Noise level at the LR end, in units of the [-1, 1] image range; higher invents more detail."""
    noise_rho: float = 1.0
    """Spacing exponent of the noise levels; 1 is even, larger crowds the HR end."""
    res_rho: float = 1.0
    """Spacing exponent of the residual weights; 1 is even, larger crowds the HR end."""
    s0: int = 4
    """Number of steps at the start of training."""
    s1: int = 3
    """Number of steps at the end of training; the curriculum falls (or rises) to it linearly."""

    def __post_init__(self) -> None:
        check(0 < self.sigma_max <= 10, f"schedule.sigma_max must be in (0, 10], got {self.sigma_max}.")
        for name in ("noise_rho", "res_rho"):
            rho = getattr(self, name)
            check(0 < rho <= 20, f"schedule.{name} must be in (0, 20], got {rho}.")
        for name in ("s0", "s1"):
            steps = getattr(self, name)
            check(1 <= steps <= 1000, f"schedule.{name} must be in [1, 1000], got {steps}.")


def karras_levels(num_steps: int, *, v_max: float, rho: float) -> Tensor:
    """Levels v_0 = 0 ... v_N = v_max: `v_i = (i/N · v_max^(1/rho))^rho`.

    Karras et al. 2022 (arXiv:2206.00364), Eq. 5, with v_min = 0 and in rising order: consistency training
    pairs i with i + 1. Computed in float64 so that both ends are exact.

    Args:
        num_steps: N, at least 1.
        v_max: Level at i = N, above 0.
        rho: Spacing exponent, above 0. 1 spaces evenly.

    Returns:
        float32 of shape (num_steps + 1,), strictly increasing.
    """
    fractions = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return (v_max * fractions**rho).float()


def trajectory_levels(config: ScheduleConfig, num_steps: int) -> tuple[Tensor, Tensor]:
    """(alphas, sigmas): residual weights and noise levels at t = 0 ... N, each float32 (num_steps + 1,)."""
    return (
        karras_levels(num_steps, v_max=1.0, rho=config.res_rho),
        karras_levels(num_steps, v_max=config.sigma_max, rho=config.noise_rho),
    )


def curriculum_steps(config: ScheduleConfig, global_step: int, total_steps: int) -> int:
    """Number of trajectory steps N at optimizer step `global_step` of `total_steps`.

    Moves from s0 to s1 one by one, in equal parts of the whole run (CT and DTM together).
    """
    stretch = max(1, total_steps // (abs(config.s0 - config.s1) + 1))
    moved = min(global_step // stretch, abs(config.s0 - config.s1))
    return config.s0 + moved if config.s1 > config.s0 else config.s0 - moved
