"""The same random crop of two image batches, resized to one size, for LPIPS in training.

pMF (arXiv:2601.22158) compares random resized crops so that the perceptual network sees no fixed grid. A crop
also makes LPIPS cheaper, by the square of its share of the side.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check
from ..rng import sample_seed
from .losses import Distance, LossConfig

_MIN_SIDE_PX = 32
"""LPIPS halves the side four times and needs pixels left."""


@dataclass(frozen=True)
class Box:
    """A square part of a picture, in pixels."""

    top: int
    left: int
    side: int


def lpips_size(config: LossConfig, hr_size: int) -> int:
    """Side in pixels of the crop that LPIPS compares, for pictures of side `hr_size`.

    Raises:
        ConfigError: It is too small for LPIPS.
    """
    size = round(config.lpips_crop * hr_size)
    check(
        size >= _MIN_SIDE_PX,
        f"loss.lpips_crop={config.lpips_crop} leaves {size} of {hr_size} pixels, and LPIPS needs "
        f"{_MIN_SIDE_PX}. Raise it, or network.lq_size.",
    )
    return size


def cropped(lpips: Distance, config: LossConfig, *, seed: int, samples: list[int], hr_size: int) -> Distance:
    """`lpips` on one random crop per sample, the same in both pictures; `lpips` itself if nothing is cropped.

    Args:
        lpips: Perceptual distance of two image batches.
        config: Size and zoom of the crops.
        seed: Seed of the run.
        samples: Global sample index of each image, which determines its crop together with `seed`.
        hr_size: The pictures' side in pixels.

    Raises:
        ConfigError: The crop is too small; see `lpips_size`.
    """
    if config.lpips_crop == 1 and config.lpips_zoom == 1:
        return lpips
    size = lpips_size(config, hr_size)
    boxes = [
        random_box(
            np.random.default_rng(sample_seed(seed, "lpips_crop", k)), hr_size, size, config.lpips_zoom
        )
        for k in samples
    ]

    def of_crops(a: Tensor, b: Tensor) -> Tensor:
        return lpips(resized_crop(a, boxes, size), resized_crop(b, boxes, size))

    return of_crops


def random_box(rng: np.random.Generator, picture: int, size: int, zoom: float) -> Box:
    """A box whose side is `size` times a factor of up to `zoom` either way, uniform in its logarithm.

    Args:
        rng: Source of side and position.
        picture: Side of the square picture that holds it, in pixels; no box is larger.
        size: Side that the box will be resized to, at most `picture`.
        zoom: Largest factor, at least 1.
    """
    low, high = size / zoom, min(size * zoom, picture)
    side = round(low * (high / low) ** rng.random())
    top, left = (int(place) for place in rng.integers(picture - side + 1, size=2))
    return Box(top, left, side)


def resized_crop(images: Tensor, boxes: list[Box], size: int) -> Tensor:
    """Each image's box at `size` x `size` pixels, with gradient.

    Args:
        images: (N, C, H, W).
        boxes: One per image, inside it.
        size: Side of the result. A box of this side is copied; others are resized bicubically, with
            antialiasing when they shrink.

    Returns:
        (N, C, size, size).
    """
    parts = []
    for image, box in zip(images, boxes, strict=True):
        part = image[None, :, box.top : box.top + box.side, box.left : box.left + box.side]
        if box.side != size:
            part = F.interpolate(part, (size, size), mode="bicubic", align_corners=False, antialias=True)
        parts.append(part)
    return torch.cat(parts)
