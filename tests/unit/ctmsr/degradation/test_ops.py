"""Each operation against its formula, scipy, torch or Pillow."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import correlate
from scipy.special import j1
from scipy.stats import poisson
from skimage import data

from ctmsr.degradation import ops

IMAGE = np.random.default_rng(0).random((40, 53, 3), dtype=np.float32)


def photo() -> np.ndarray:
    return ops.unit_from_u8(data.astronaut()[:128, 128:256])


# kernels


def form(size: int, widths: tuple[float, float], rotation_rad: float) -> np.ndarray:
    """x^T S^-1 x with S written out as a matrix and inverted, point by point."""
    cos, sin = math.cos(rotation_rad), math.sin(rotation_rad)
    rotation = np.array([[cos, -sin], [sin, cos]])
    inverse = np.linalg.inv(rotation @ np.diag(np.square(widths)) @ rotation.T)
    reach = range(-(size // 2), size // 2 + 1)
    return np.array([[np.array([x, y]) @ inverse @ np.array([x, y]) for x in reach] for y in reach])


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.5])
@pytest.mark.parametrize(
    ("widths", "rotation_rad"), [((1.3, 1.3), 0.0), ((0.6, 2.8), 0.7), ((3.0, 0.2), -3.0)]
)
def test_gaussian_and_plateau_kernels_follow_their_formulas(
    widths: tuple[float, float], rotation_rad: float, beta: float
) -> None:
    distance = form(15, widths, rotation_rad)
    for kernel, expected in (
        (ops.gaussian_kernel, np.exp(-0.5 * distance**beta)),
        (ops.plateau_kernel, 1 / (distance**beta + 1)),
    ):
        actual = kernel(15, widths, rotation_rad=rotation_rad, beta=beta)
        np.testing.assert_allclose(actual, expected / expected.sum(), atol=2e-8, rtol=1e-5)
        assert actual.sum() == pytest.approx(1, abs=5e-6)


def test_rotation_turns_x_into_y() -> None:
    wide = ops.gaussian_kernel(11, (3.0, 0.5))
    assert wide[5, 0] > wide[0, 5]  # the first width lies along x, the columns
    np.testing.assert_allclose(
        ops.gaussian_kernel(11, (3.0, 0.5), rotation_rad=math.pi / 2), wide.T, atol=1e-8
    )


def test_sinc_kernel_follows_its_formula() -> None:
    radius = np.hypot(*np.mgrid[-6:7, -6:7])
    radius[6, 6] = 1e-6  # the formula itself, close to its limit
    expected = 1.2 * j1(1.2 * radius) / (2 * math.pi * radius)
    kernel = ops.sinc_kernel(13, 1.2)
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-7)
    assert kernel.sum() == pytest.approx(1, abs=5e-6)
    assert kernel.min() < 0


def test_sinc_kernel_passes_low_and_stops_high_frequencies() -> None:
    kernel = ops.sinc_kernel(51, math.pi / 3)
    phase = np.arange(-25, 26)

    def gain(frequency_rad: float) -> float:
        return float((kernel.sum(axis=0) * np.cos(frequency_rad * phase)).sum())

    assert gain(0.5) == pytest.approx(1, abs=0.1)
    assert gain(1.6) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("size", [3, 9, 19])
def test_no_kernel_holds_taps_that_only_cost_time(size: int) -> None:
    for kernel in (ops.gaussian_kernel(size, (0.2, 1.0)), ops.plateau_kernel(size, (0.2, 0.2), beta=2.0)):
        taps = np.abs(kernel[kernel != 0])
        assert taps.min() >= 1e-8


# blur


@pytest.mark.parametrize("size", [3, 11, 13, 19])
@pytest.mark.parametrize("height", [4, 40])
def test_blur_is_correlation_with_a_mirrored_border(size: int, height: int) -> None:
    kernel = np.random.default_rng(size).random((size, size), dtype=np.float32)  # asymmetric: no flip hides
    kernel /= kernel.sum()
    expected = np.stack(
        [correlate(IMAGE[:height, :, c].astype(float), kernel, mode="mirror") for c in range(3)], -1
    )
    np.testing.assert_allclose(ops.blur(IMAGE[:height], kernel), expected, atol=2e-6)


def test_blur_with_a_unit_pulse_changes_nothing() -> None:
    pulse = np.zeros((21, 21), np.float32)
    pulse[10, 10] = 1
    np.testing.assert_array_equal(ops.blur(IMAGE, pulse), IMAGE)


# resize


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(6, 8), (40, 53), (41, 30), (60, 79), (20, 106), (1, 1)])
def test_resize_matches_torch(size: tuple[int, int], mode: ops.ResizeMode) -> None:
    nchw = torch.from_numpy(IMAGE).permute(2, 0, 1)[None]
    expected = F.interpolate(nchw, size=size, mode=mode)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ops.resize(IMAGE, size, mode), expected, atol=1e-5)


# noise


def test_gaussian_noise_has_the_asked_moments() -> None:
    grey = np.full((200, 200, 3), 0.5, np.float32)
    noisy = ops.add_gaussian_noise(grey, 0.1, is_grey=False, rng=np.random.default_rng(0))
    assert noisy.mean() == pytest.approx(0.5, abs=0.002)
    assert noisy.std() == pytest.approx(0.1, rel=0.02)
    correlation = np.corrcoef(noisy.reshape(-1, 3).T)
    assert np.abs(correlation - np.eye(3)).max() < 0.03


def test_gaussian_grey_noise_is_shared_by_the_channels() -> None:
    image = np.full((100, 100, 3), (0.4, 0.5, 0.6), np.float32)
    noise = ops.add_gaussian_noise(image, 0.05, is_grey=True, rng=np.random.default_rng(0)) - image
    np.testing.assert_allclose(noise, noise[..., :1] * np.ones(3), atol=1e-6)
    assert noise.std() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize(("num_levels", "peak"), [(1, 1), (2, 2), (3, 4), (5, 8), (200, 256)])
def test_poisson_noise_is_shot_noise_of_its_peak(num_levels: int, peak: int) -> None:
    """Mean 0 and variance scale^2 x / peak at level x, peak being num_levels rounded up to a power of two."""
    levels = np.linspace(1, 200, num_levels).round().astype(np.uint8)
    assert len(np.unique(levels)) == num_levels
    image = ops.unit_from_u8(np.broadcast_to(levels[:, None, None], (num_levels, 60_000 // num_levels, 3)))
    noise = ops.add_poisson_noise(image, 0.02, is_grey=False, rng=np.random.default_rng(0)) - image
    standardized = noise / (0.02 * np.sqrt(image / peak))
    assert standardized.mean() == pytest.approx(0, abs=0.015)
    assert standardized.std() == pytest.approx(1, rel=0.02)
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("level", [0, 1, 10, 128, 255])
@pytest.mark.parametrize("peak", [1, 16, 256])
def test_poisson_counts_follow_their_distribution(level: int, peak: int) -> None:
    num_draws = 40_000
    levels = np.full(num_draws, level, np.uint8)
    counts = ops._draw_poisson(levels, peak, np.random.default_rng(0))
    expected = poisson.cdf(np.arange(counts.max() + 1), peak * level / 255)
    actual = np.cumsum(np.bincount(counts)) / num_draws
    assert np.abs(actual - expected).max() < 1.95 / math.sqrt(num_draws)  # Kolmogorov-Smirnov at 0.001


@pytest.mark.parametrize("peak", [1, 16, 256])
def test_poisson_counts_are_the_first_whose_probability_is_above_the_draw(peak: int) -> None:
    levels = np.random.default_rng(1).integers(0, 256, 20_000, np.uint8)
    counts = ops._draw_poisson(levels, peak, np.random.default_rng(0))
    draws = np.random.default_rng(0).random(len(levels), dtype=np.float32)
    cdf, _ = ops._poisson_tables(peak)
    expected = [
        np.searchsorted(cdf[level], draw, side="right") for level, draw in zip(levels, draws, strict=True)
    ]
    np.testing.assert_array_equal(counts, expected)


def test_poisson_grey_noise_is_shared_and_follows_the_luma() -> None:
    image = np.full((200, 200, 3), ops.unit_from_u8(np.array([100, 150, 200], np.uint8)), np.float32)
    noise = ops.add_poisson_noise(image, 0.02, is_grey=True, rng=np.random.default_rng(0)) - image
    np.testing.assert_allclose(noise, noise[..., :1] * np.ones(3), atol=1e-6)
    luma = (0.299 * 100 + 0.587 * 150 + 0.114 * 200) / 255
    assert noise[..., 0].std() == pytest.approx(0.02 * math.sqrt(luma), rel=0.03)


def test_noise_is_clipped_and_vanishes_at_strength_zero() -> None:
    rng = np.random.default_rng(0)
    for noisy in (
        ops.add_gaussian_noise(IMAGE, 2.0, is_grey=False, rng=rng),
        ops.add_poisson_noise(IMAGE, 50.0, is_grey=False, rng=rng),
    ):
        assert noisy.min() == 0
        assert noisy.max() == 1
    np.testing.assert_array_equal(ops.add_gaussian_noise(IMAGE, 0.0, is_grey=True, rng=rng), IMAGE)
    np.testing.assert_array_equal(ops.add_poisson_noise(IMAGE, 0.0, is_grey=True, rng=rng), IMAGE)


# JPEG


@pytest.mark.parametrize("quality", [5, 30, 95])
def test_jpeg_is_what_another_encoder_makes_of_it(quality: int) -> None:
    image = photo()
    buffer = io.BytesIO()
    Image.fromarray(ops.u8_from_unit(image)).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer))
    difference = np.abs(ops.u8_from_unit(ops.jpeg(image, quality)).astype(int) - expected)
    assert difference.mean() < 0.2
    assert difference.max() <= 4


def test_jpeg_error_grows_as_quality_falls() -> None:
    image = photo()
    errors = [float(np.square(ops.jpeg(image, quality) - image).mean()) for quality in (100, 95, 60, 30, 10)]
    assert errors == sorted(errors)
    assert errors[-1] > 5 * errors[1] > 0


def test_jpeg_accepts_overshoot_and_tiny_pictures() -> None:
    white = np.full((3, 2, 3), 1.4, np.float32)
    np.testing.assert_allclose(ops.jpeg(white, 95), 1, atol=2 / 255)


# 8 bits


def test_levels_round_to_nearest_and_survive_a_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(ops.u8_from_unit(ops.unit_from_u8(levels)), levels)
    values = np.array([-0.2, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.3], np.float32)
    assert ops.u8_from_unit(values).tolist() == [0, 0, 1, 255, 255]
