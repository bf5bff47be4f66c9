"""NIQE, the no-reference score of naturalness: Mittal, Soundararajan and Bovik 2013, IEEE SPL 20(3).

The statistics of natural pictures in niqe_natural.safetensors are those of the authors' release (Laboratory
for Image & Video Engineering, The University of Texas at Austin), free to copy for any purpose under this
notice. Implemented here because libraries with NIQE contain a hundred other metrics and download its
parameters.
"""

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from scipy.special import gamma

from .full_reference import luma

BLOCK_PX = 96
MIN_SIDE_PX = 2 * BLOCK_PX
"""A covariance needs more than one block."""

_SHAPES = np.arange(0.2, 10.001, 0.001)
_SHAPE_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


def niqe(image_u8: np.ndarray, *, crop_border: int = 0) -> float:
    """Distance of a picture's statistics from natural ones; lower is more natural, photographs score 2 to 6.

    Args:
        image_u8: uint8 HWC RGB. Its luma is cut to whole blocks of BLOCK_PX at the bottom and right.
        crop_border: Pixels cut from every side first.

    Raises:
        ValueError: It is not such a picture, or a side is below MIN_SIDE_PX after the cut.
    """
    y = luma(image_u8, crop_border).round()
    if min(y.shape) < MIN_SIDE_PX:
        raise ValueError(f"NIQE needs sides of {MIN_SIDE_PX} pixels or more, got {y.shape}.")
    rows, columns = (side // BLOCK_PX for side in y.shape)
    y = y[: rows * BLOCK_PX, : columns * BLOCK_PX]
    half = F.interpolate(torch.from_numpy(y)[None, None], scale_factor=0.5, mode="bicubic", antialias=True)
    features = np.hstack([_block_features(y, BLOCK_PX), _block_features(half[0, 0].numpy(), BLOCK_PX // 2)])
    natural_mean, natural_covariance = _natural()
    difference = natural_mean - np.nanmean(features, axis=0)  # a flat block has no shape and gives NaN
    covariance = np.cov(features[~np.isnan(features).any(axis=1)], rowvar=False)
    pooled = np.linalg.pinv((natural_covariance + covariance) / 2)
    return float(np.sqrt(difference @ pooled @ difference))


@lru_cache(maxsize=1)
def _natural() -> tuple[np.ndarray, np.ndarray]:
    tensors = load_file(Path(__file__).with_name("niqe_natural.safetensors"))
    return tensors["mean"], tensors["covariance"]


def _block_features(y: np.ndarray, size: int) -> np.ndarray:
    """(blocks, 18) of float64 luma: shape and scale of the normalised pixels, and of neighbours' products."""
    mean, mean_square = (
        cv2.GaussianBlur(values, (7, 7), 7 / 6, borderType=cv2.BORDER_REPLICATE) for values in (y, y * y)
    )
    normalised = (y - mean) / (np.sqrt(np.abs(mean_square - mean**2)) + 1)
    blocks = [
        normalised[top : top + size, left : left + size]
        for top in range(0, y.shape[0], size)
        for left in range(0, y.shape[1], size)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.array([_features(block) for block in blocks])


def _features(block: np.ndarray) -> list[float]:
    shape, left, right = _asymmetric_gaussian(block)
    features = [shape, (left + right) / 2]
    for shift in _NEIGHBOURS:
        shape, left, right = _asymmetric_gaussian(block * np.roll(block, shift, axis=(0, 1)))
        features += [shape, (right - left) * (gamma(2 / shape) / gamma(1 / shape)), left, right]
    return features


def _asymmetric_gaussian(block: np.ndarray) -> tuple[float, float, float]:
    """Shape, left and right scale of an asymmetric generalized Gaussian, by moment matching."""
    left_std, right_std = (
        np.sqrt(np.mean(block[side] ** 2)) if side.any() else np.nan for side in (block < 0, block > 0)
    )
    ratio = left_std / right_std
    moments = np.mean(np.abs(block)) ** 2 / np.mean(block**2)
    target = moments * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shape = _SHAPES[np.argmin((_SHAPE_RATIOS - target) ** 2)]
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left_std * scale, right_std * scale
