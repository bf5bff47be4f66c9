"""The published defaults are accepted, every validator refuses, and nothing is filled in silently."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from ctmsr.config import from_dict, to_dict
from ctmsr.degradation.config import BlurKinds, DegradationConfig, StageConfig
from ctmsr.errors import ConfigError

PUBLISHED = DegradationConfig()


def change(stage: StageConfig, name: str, value: Any) -> StageConfig:
    return replace(stage, **{name: value})


def test_defaults_survive_a_plain_dict() -> None:
    assert from_dict(DegradationConfig, to_dict(PUBLISHED)) == PUBLISHED
    assert from_dict(DegradationConfig, {}) == PUBLISHED


PROBABILITIES = [
    "prob",
    "blur_prob",
    "sinc_prob",
    "gaussian_prob",
    "grey_prob",
    "jpeg_prob",
    "resize_up_prob",
]


@pytest.mark.parametrize("name", [*PROBABILITIES, "resize_down_prob"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_stage_probabilities_must_be_probabilities(name: str, value: float) -> None:
    message = f"degradation.<stage>.{name} must be a probability in [0, 1], got {value}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        change(PUBLISHED.stage1, name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blur_sigma_px", (0.0, 3.0)),
        ("blur_sigma_px", (3.0, 0.2)),
        ("blur_sigma_px", (0.2, math.inf)),
        ("generalized_beta", (0.0, 4.0)),
        ("generalized_beta", (1.5, 4.0)),
        ("plateau_beta", (0.5, 0.9)),
        ("sinc_cutoff_rad", (0.0, 3.0)),
        ("sinc_cutoff_rad", (1.0, 3.2)),
        ("sinc_cutoff_large_rad", (2.0, 1.0)),
        ("resize_range", (0.0, 1.5)),
        ("resize_range", (1.1, 1.5)),
        ("resize_range", (0.2, 0.9)),
        ("noise_std", (-0.1, 0.1)),
        ("noise_std", (0.1, 30.0)),
        ("noise_std", (math.nan, 0.1)),
        ("poisson_scale", (-1.0, 3.0)),
        ("jpeg_quality", (0.0, 95.0)),
        ("jpeg_quality", (30.0, 101.0)),
    ],
)
def test_stage_ranges_must_be_ordered_and_inside_their_limits(name: str, value: tuple[float, float]) -> None:
    got = re.escape(str(value))
    match = rf"^degradation\.<stage>\.{name} must be a pair low <= .*within \[.*\], got {got}\.$"
    with pytest.raises(ConfigError, match=match):
        change(PUBLISHED.stage2, name, value)


@pytest.mark.parametrize("value", [1, 4, -3])
def test_kernel_sides_must_be_odd(value: int) -> None:
    match = rf"kernel_px must be odd and at least 3, got {value}\."
    with pytest.raises(ConfigError, match="max_blur_" + match):
        replace(PUBLISHED.stage1, max_blur_kernel_px=value)
    with pytest.raises(ConfigError, match="final_max_sinc_" + match):
        DegradationConfig(final_max_sinc_kernel_px=value)


def test_resize_probabilities_must_leave_room() -> None:
    with pytest.raises(
        ConfigError, match=r"resize_up_prob \+ resize_down_prob must be at most 1, got 1\.2\."
    ):
        replace(PUBLISHED.stage1, resize_up_prob=0.5, resize_down_prob=0.7)


def test_blur_kinds_must_sum_to_one() -> None:
    with pytest.raises(ConfigError, match=r"blur_kinds must sum to 1, got 1\.1\."):
        BlurKinds(iso=0.55)
    with pytest.raises(
        ConfigError, match=r"blur_kinds\.aniso must be a probability in \[0, 1\], got -0\.25\."
    ):
        BlurKinds(aniso=-0.25)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"final_sinc_prob": 2.0}, r"final_sinc_prob must be a probability in \[0, 1\], got 2\.0"),
        (
            {"final_jpeg_last_prob": -1.0},
            r"final_jpeg_last_prob must be a probability in \[0, 1\], got -1\.0",
        ),
        ({"final_sinc_cutoff_rad": (1.0, 4.0)}, r"final_sinc_cutoff_rad must be a pair .*got \(1\.0, 4\.0\)"),
        ({"final_jpeg_quality": (95.0, 30.0)}, r"final_jpeg_quality must be a pair .*got \(95\.0, 30\.0\)"),
    ],
)
def test_final_settings_are_checked(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=r"^degradation\." + match):
        DegradationConfig(**values)
