"""PSNR, SSIM and LPIPS against closed forms and against formulas written out here."""

import math

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from torch.nn import functional

from ctmsr.metrics.full_reference import colour_error, lpips_alex, psnr_y, ssim_y
from ctmsr.metrics.niqe import niqe
from ctmsr.metrics.perceptual import Lpips, load_lpips


@pytest.fixture(scope="module")
def alex() -> Lpips:
    return load_lpips("alex")


def flat(red: int, green: int, blue: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), (red, green, blue), np.uint8)


def noisy_pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hr_u8 = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    noise = rng.integers(-20, 21, hr_u8.shape)
    return np.clip(hr_u8 + noise, 0, 255).astype(np.uint8), hr_u8


def bt601_luma(image_u8: np.ndarray) -> np.ndarray:
    return 16 + image_u8.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


@pytest.mark.parametrize(
    ("sr", "hr", "luma_error"),
    [
        ((255, 255, 255), (0, 0, 0), 219.0),
        ((110, 110, 110), (100, 100, 100), 10 * 219 / 255),
        ((50, 0, 0), (0, 0, 0), 50 * 65.481 / 255),
        ((0, 50, 0), (0, 0, 0), 50 * 128.553 / 255),
        ((0, 0, 50), (0, 0, 0), 50 * 24.966 / 255),
    ],
)
def test_psnr_of_flat_images_in_closed_form(
    sr: tuple[int, int, int], hr: tuple[int, int, int], luma_error: float
) -> None:
    assert psnr_y(flat(*sr), flat(*hr)) == pytest.approx(20 * math.log10(255 / luma_error))


def test_psnr_against_the_formula() -> None:
    sr_u8, hr_u8 = noisy_pair()
    mse = np.mean((bt601_luma(sr_u8) - bt601_luma(hr_u8)) ** 2)
    assert psnr_y(sr_u8, hr_u8) == pytest.approx(10 * math.log10(255**2 / mse))


def test_equal_images_reach_the_limits(alex: Lpips) -> None:
    _, hr_u8 = noisy_pair()
    assert psnr_y(hr_u8, hr_u8) == math.inf
    assert ssim_y(hr_u8, hr_u8) == 1
    assert lpips_alex(hr_u8, hr_u8, alex) == 0


def test_ssim_of_flat_images_in_closed_form() -> None:
    a, b = 16 + 100 * 219 / 255, 16 + 200 * 219 / 255
    c1 = (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    assert ssim_y(flat(100, 100, 100), flat(200, 200, 200)) == pytest.approx(expected)


def test_ssim_against_wang_et_al_written_out() -> None:
    sr_u8, hr_u8 = noisy_pair()
    profile = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = torch.from_numpy(np.outer(profile, profile) / profile.sum() ** 2)[None, None]

    def mean(image: np.ndarray) -> np.ndarray:
        return functional.conv2d(torch.from_numpy(image)[None, None], window).numpy()[0, 0]

    x, y = bt601_luma(sr_u8), bt601_luma(hr_u8)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    expected = numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert ssim_y(sr_u8, hr_u8) == pytest.approx(expected.mean(), abs=1e-9)


def test_crop_border_cuts_every_side_by_that_much() -> None:
    _, hr_u8 = noisy_pair()
    sr_u8 = hr_u8.copy()
    for edge in (sr_u8[:4], sr_u8[-4:], sr_u8[:, :4], sr_u8[:, -4:]):
        edge[:] = 255 - edge
    assert psnr_y(sr_u8, hr_u8, crop_border=3) < math.inf
    assert psnr_y(sr_u8, hr_u8, crop_border=4) == math.inf
    assert ssim_y(sr_u8, hr_u8, crop_border=3) < 1
    assert ssim_y(sr_u8, hr_u8, crop_border=4) == 1


def test_lpips_alex_is_the_network_on_the_range_minus_one_to_one(alex: Lpips) -> None:
    sr_u8, hr_u8 = noisy_pair()
    a, b = (torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None].float() for image in (sr_u8, hr_u8))
    assert lpips_alex(sr_u8, hr_u8, alex) == pytest.approx(alex(a, b).item(), rel=1e-4)


@pytest.mark.parametrize("metric", [psnr_y, ssim_y, lpips_alex])
def test_images_that_do_not_match_are_refused(metric: object, alex: Lpips) -> None:
    assert callable(metric)
    extra = (alex,) if metric is lpips_alex else ()
    image = flat(0, 0, 0)
    with pytest.raises(ValueError, match=r"shape|dimensions"):
        metric(image[:31], image, *extra)
    with pytest.raises(ValueError, match=r"must be uint8 HWC RGB, got float64"):
        metric(image / 255, image, *extra)
    with pytest.raises(ValueError, match=r"must be uint8 HWC RGB, got uint8 of shape \(32, 32\)"):
        metric(image[..., 0], image, *extra)


@pytest.mark.parametrize("crop_border", [-1, 16])
def test_a_border_that_leaves_nothing_is_refused(crop_border: int) -> None:
    with pytest.raises(ValueError, match=rf"32x32 image, got {crop_border}"):
        psnr_y(flat(0, 0, 0), flat(0, 0, 0), crop_border=crop_border)


def test_colour_error_of_a_cast_is_its_mean_in_levels() -> None:
    assert colour_error(flat(110, 95, 100), flat(100, 100, 100)) == pytest.approx(5)
    assert colour_error(flat(100, 100, 100), flat(100, 100, 100)) == 0


def test_colour_error_sees_slow_waves_as_gaussian_theory_says_and_no_fine_ones() -> None:
    x = np.arange(512)
    for period_px, sigma_px in ((128, 8), (64, 8), (64, 16)):
        wave = 60 * np.sin(2 * np.pi * x / period_px)
        image = np.broadcast_to(np.rint(128 + wave)[None, :, None], (64, 512, 3)).astype(np.uint8)
        passed = math.exp(-2 * (math.pi * sigma_px / period_px) ** 2)
        found = colour_error(image, flat(128, 128, 128, 512)[:64], blur_sigma_px=sigma_px)
        assert found == pytest.approx(60 * passed * 2 / math.pi, rel=0.1)  # the edges differ
    checks = np.where((x[:64, None] + x) % 2, 188, 68)[..., None].repeat(3, axis=2).astype(np.uint8)
    assert colour_error(checks, flat(128, 128, 128, 512)[:64]) < 0.2  # of 60, at the edges


def test_colour_error_takes_the_lr_picture_too() -> None:
    _, lq_u8 = noisy_pair()
    sr_u8 = lq_u8.repeat(4, axis=0).repeat(4, axis=1)
    assert colour_error(sr_u8, lq_u8) == 0
    darker = (sr_u8 // 2 + 20).astype(np.uint8)
    cast = colour_error((sr_u8 // 2 + 23).astype(np.uint8), darker)
    assert cast == pytest.approx(3)
    averaged = darker.reshape(40, 4, 48, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    assert colour_error(darker + np.uint8(3), averaged) == pytest.approx(3)
    with pytest.raises(ValueError, match=r"a whole number of times less on each side, got \(40, 48, 3\)"):
        colour_error(sr_u8[:158], lq_u8)


@pytest.mark.parametrize(
    ("photo", "crop_border", "expected"),
    [("astronaut", 0, 3.06461), ("chelsea", 0, 2.62554), ("coffee", 4, 4.07943), ("rocket", 4, 6.73312)],
)
def test_niqe_agrees_with_basicsr(photo: str, crop_border: int, expected: float) -> None:
    # Computed with BasicSR 1.4.2 (calculate_niqe, convert_to="y"), which follows the authors' MATLAB release.
    assert niqe(getattr(skimage.data, photo)(), crop_border=crop_border) == pytest.approx(expected, rel=0.004)


def test_niqe_tells_a_photograph_from_a_blurred_one_and_refuses_small_ones() -> None:
    photo = skimage.data.chelsea()
    assert niqe(cv2.GaussianBlur(photo, (0, 0), 3)) > niqe(photo) + 1
    flat_corner = photo.copy()
    flat_corner[:96, :96] = 128  # a block without any structure counts for nothing
    assert math.isfinite(niqe(flat_corner))
    with pytest.raises(ValueError, match="sides of 192 pixels or more"):
        niqe(photo[:191])
