"""Levels in closed form, and the curriculum step by step."""

import re
from typing import Any

import pytest
import torch

from ctmsr.errors import ConfigError
from ctmsr.model.schedule import ScheduleConfig, curriculum_steps, karras_levels, trajectory_levels


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 3, 4, 7])
def test_both_ends_are_exact_and_levels_rise(num_steps: int, rho: float) -> None:
    levels = karras_levels(num_steps, v_max=0.7, rho=rho)
    assert (levels.shape, levels.dtype) == ((num_steps + 1,), torch.float32)
    assert levels[0] == 0
    assert levels[-1] == torch.tensor(0.7)
    assert (levels.diff() > 0).all()


def test_karras_form() -> None:
    # v_max^(1/3) = 2, so v_i = (2 i/4)^3.
    torch.testing.assert_close(
        karras_levels(4, v_max=8.0, rho=3.0), torch.tensor([0.0, 0.125, 1.0, 3.375, 8.0])
    )


def test_published_trajectory_is_linear() -> None:
    alphas, sigmas = trajectory_levels(ScheduleConfig(), 3)
    torch.testing.assert_close(alphas, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    torch.testing.assert_close(sigmas, alphas)


def test_noise_and_residual_have_their_own_exponents() -> None:
    config = ScheduleConfig(sigma_max=0.5, noise_rho=2.0, res_rho=3.0)
    alphas, sigmas = trajectory_levels(config, 2)
    torch.testing.assert_close(alphas, torch.tensor([0, 1 / 8, 1]))
    torch.testing.assert_close(sigmas, torch.tensor([0, 0.5 / 4, 0.5]))


@pytest.mark.parametrize(
    ("s0", "s1", "total", "expected"),
    [
        (4, 3, 10, [4] * 5 + [3] * 5),
        (4, 3, 11, [4] * 5 + [3] * 6),  # S = floor(11 / 2); the last stretch takes the rest
        (5, 2, 8, [5, 5, 4, 4, 3, 3, 2, 2]),
        (5, 2, 10, [5, 5, 4, 4, 3, 3, 2, 2, 2, 2]),
        (2, 4, 9, [2, 2, 2, 3, 3, 3, 4, 4, 4]),
        (3, 3, 5, [3] * 5),
        (6, 3, 2, [6, 5]),  # fewer updates than levels: one update each, as far as it goes
    ],
)
def test_curriculum(s0: int, s1: int, total: int, expected: list[int]) -> None:
    config = ScheduleConfig(s0=s0, s1=s1)
    assert [curriculum_steps(config, step, total) for step in range(total)] == expected


@pytest.mark.parametrize(("s0", "s1"), [(4, 3), (2, 5), (3, 3)])
def test_curriculum_never_passes_its_end(s0: int, s1: int) -> None:
    assert curriculum_steps(ScheduleConfig(s0=s0, s1=s1), 10_000, 10) == s1


def test_published_curriculum_changes_halfway() -> None:
    config, total = ScheduleConfig(), 502_000
    assert [curriculum_steps(config, step, total) for step in (0, 250_999, 251_000, 501_999)] == [4, 4, 3, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma_max": 0.0}, "schedule.sigma_max must be in (0, 10], got 0.0."),
        ({"sigma_max": float("nan")}, "schedule.sigma_max must be in (0, 10], got nan."),
        ({"noise_rho": 0.0}, "schedule.noise_rho must be in (0, 20], got 0.0."),
        ({"res_rho": 21.0}, "schedule.res_rho must be in (0, 20], got 21.0."),
        ({"s0": 0}, "schedule.s0 must be in [1, 1000], got 0."),
        ({"s1": 1001}, "schedule.s1 must be in [1, 1000], got 1001."),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ScheduleConfig(**values)
