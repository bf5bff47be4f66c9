"""PSNR, SSIM, LPIPS and colour error of a super-resolved image against its ground truth.

PSNR and SSIM are computed on luma, as in super-resolution papers: ITU-R BT.601 Y in studio range
(16..235 for black..white, MATLAB's `rgb2ycbcr`), unrounded, against a peak of 255.

skimage.metrics is imported where it is used: with scipy.stats it would cost each process of a training 0.6 s.
"""

import cv2
import numpy as np
import torch
from skimage.color import rgb2ycbcr

from ..image.ranges import to_tensor
from .perceptual import Lpips


def psnr_y(sr_u8: np.ndarray, hr_u8: np.ndarray, *, crop_border: int = 0) -> float:
    """Peak signal-to-noise ratio of luma, in dB; infinite for equal images.

    Args:
        sr_u8: uint8 HWC RGB.
        hr_u8: The same shape as `sr_u8`.
        crop_border: Pixels cut from every side first. Papers cut `scale` pixels, or none.

    Raises:
        ValueError: The images are of other kinds or of unequal shapes, or nothing is left after the cut.
    """
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):  # equal images
        return float(
            peak_signal_noise_ratio(luma(hr_u8, crop_border), luma(sr_u8, crop_border), data_range=255)
        )


def ssim_y(sr_u8: np.ndarray, hr_u8: np.ndarray, *, crop_border: int = 0) -> float:
    """Structural similarity of luma, at most 1, which equal images reach.

    Wang et al. 2004, with its constants: an 11x11 Gaussian window of 1.5 px, averaged where the window lies
    inside the image.

    Args:
        sr_u8: uint8 HWC RGB.
        hr_u8: The same shape as `sr_u8`.
        crop_border: Pixels cut from every side first; 11 pixels or more must be left.

    Raises:
        ValueError: The images are of other kinds or of unequal shapes, or too little is left after the cut.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            luma(hr_u8, crop_border),
            luma(sr_u8, crop_border),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def lpips_alex(sr_u8: np.ndarray, hr_u8: np.ndarray, net: Lpips) -> float:
    """LPIPS on RGB, uncropped; 0 for equal images, larger for more different ones.

    Args:
        sr_u8: uint8 HWC RGB, with sides of 32 pixels or more.
        hr_u8: The same shape as `sr_u8`.
        net: `load_lpips("alex")`, on any device.

    Raises:
        ValueError: The images are of other kinds or of unequal shapes.
    """
    check_pair(sr_u8, hr_u8)
    device = next(net.parameters()).device
    with torch.inference_mode():
        return net(to_tensor(sr_u8[None]).to(device), to_tensor(hr_u8[None]).to(device)).item()


def colour_error(sr_u8: np.ndarray, reference_u8: np.ndarray, *, blur_sigma_px: float = 8.0) -> float:
    """Mean absolute difference of low frequencies, in levels of 0..255: a colour cast or uneven brightness.

    Args:
        sr_u8: uint8 HWC RGB.
        reference_u8: The ground truth, or the LR picture: of the same shape, or with each side k times
            smaller, in which case `sr_u8` is averaged over k x k pixels first.
        blur_sigma_px: Width of the Gaussian that leaves low frequencies, in pixels of `sr_u8`. The default is
            two LR pixels at x4.

    Raises:
        ValueError: The images are of other kinds, or their sides do not match.
    """
    for image_u8 in (sr_u8, reference_u8):
        _check_rgb_u8(image_u8)
    (height, width), (low_height, low_width) = sr_u8.shape[:2], reference_u8.shape[:2]
    k = max(1, height // low_height)
    if (height, width) != (k * low_height, k * low_width):
        raise ValueError(
            f"reference_u8 must have the shape of sr_u8, {sr_u8.shape}, or a whole number of times less on "
            f"each side, got {reference_u8.shape}."
        )
    sr = sr_u8.reshape(low_height, k, low_width, k, 3).mean(axis=(1, 3))
    low = cv2.GaussianBlur(sr - reference_u8, (0, 0), blur_sigma_px / k, borderType=cv2.BORDER_REPLICATE)
    return float(np.abs(low).mean())


def luma(image_u8: np.ndarray, crop_border: int) -> np.ndarray:
    """float64 (H, W) in 16..235, without the border."""
    _check_rgb_u8(image_u8)
    height, width = image_u8.shape[:2]
    if not 0 <= 2 * crop_border < min(height, width):
        raise ValueError(
            f"crop_border must be at least 0 and leave pixels of a {height}x{width} image, got {crop_border}."
        )
    inside = image_u8[crop_border : height - crop_border, crop_border : width - crop_border]
    return rgb2ycbcr(inside)[..., 0]


def check_pair(sr_u8: np.ndarray, hr_u8: np.ndarray) -> None:
    """Rejects pictures that cannot be compared.

    Raises:
        ValueError: One is not uint8 HWC RGB, or their shapes differ.
    """
    for image_u8 in (sr_u8, hr_u8):
        _check_rgb_u8(image_u8)
    if sr_u8.shape != hr_u8.shape:
        raise ValueError(f"sr_u8 and hr_u8 must have the same shape, got {sr_u8.shape} and {hr_u8.shape}.")


def _check_rgb_u8(image_u8: np.ndarray) -> None:
    if image_u8.dtype != np.uint8 or image_u8.ndim != 3 or image_u8.shape[2] != 3:
        raise ValueError(f"An image must be uint8 HWC RGB, got {image_u8.dtype} of shape {image_u8.shape}.")
