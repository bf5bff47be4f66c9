"""The degradation HR -> LQ: the order of the operations and their random draws.

Real-ESRGAN's second-order model (Wang et al. 2021, arXiv:2107.10833): stage1, then half of the time stage2,
then a final resize, sinc filter and JPEG. Probabilities and ranges are in `config`, the operations in `ops`.
"""

import math
from dataclasses import fields
from typing import get_args

import numpy as np

from ..errors import ConfigError
from . import ops
from .config import DegradationConfig, StageConfig


def degrade(
    hr_u8: np.ndarray, *, scale: int, config: DegradationConfig, rng: np.random.Generator
) -> np.ndarray:
    """One random degraded version of a clean crop.

    Differs from Real-ESRGAN's code in two places. Its first resize maps coordinates by the drawn factor and
    so shifts content when the size is rounded down; here corners stay aligned, as in its later resizes. Its
    JPEG is a differentiable approximation; here it is the codec. Kernels are not padded: zeros do nothing.

    Args:
        hr_u8: uint8 of shape (height, width, 3), RGB; both sides are multiples of `scale`.
        scale: HR/LQ ratio.
        config: Probabilities and ranges.
        rng: The only source of randomness: equal state gives equal bytes.

    Returns:
        `lq_u8`, uint8 of shape (height // scale, width // scale, 3).

    Raises:
        ConfigError: A side is not a multiple of `scale`.
    """
    height, width = hr_u8.shape[:2]
    if height % scale or width % scale:
        raise ConfigError(
            f"the sides of the {width}x{height} HR crop are not multiples of scale ({scale}). "
            "Choose another crop size."
        )
    lq_size = (height // scale, width // scale)
    image = ops.unit_from_u8(hr_u8)
    image = _apply_stage(image, (height, width), config.stage1, rng)
    image = _apply_stage(image, lq_size, config.stage2, rng)
    image = _finish(image, lq_size, config, rng)
    return ops.u8_from_unit(image)


def _apply_stage(
    image: np.ndarray, base_size: tuple[int, int], stage: StageConfig, rng: np.random.Generator
) -> np.ndarray:
    if rng.random() >= stage.prob:
        return image
    if rng.random() < stage.blur_prob:
        image = ops.blur(image, _draw_kernel(stage, rng))
    image = ops.resize(image, _draw_size(base_size, stage, rng), _draw_resize_mode(rng))
    image = _add_noise(image, stage, rng)
    if rng.random() < stage.jpeg_prob:
        image = ops.jpeg(image, _draw_quality(stage.jpeg_quality, rng))
    return image


def _finish(
    image: np.ndarray, lq_size: tuple[int, int], config: DegradationConfig, rng: np.random.Generator
) -> np.ndarray:
    """The final resize, sinc filter and JPEG, in one of the two published orders."""
    is_jpeg_last = rng.random() < config.final_jpeg_last_prob
    quality = _draw_quality(config.final_jpeg_quality, rng)
    if not is_jpeg_last:
        image = ops.jpeg(image, quality)
    image = ops.resize(image, lq_size, _draw_resize_mode(rng))
    if rng.random() < config.final_sinc_prob:
        side = _draw_kernel_side(config.final_max_sinc_kernel_px, rng)
        image = ops.blur(image, ops.sinc_kernel(side, rng.uniform(*config.final_sinc_cutoff_rad)))
    return ops.jpeg(image, quality) if is_jpeg_last else image


def _draw_kernel(stage: StageConfig, rng: np.random.Generator) -> np.ndarray:
    side = _draw_kernel_side(stage.max_blur_kernel_px, rng)
    if rng.random() < stage.sinc_prob:
        cutoff = stage.sinc_cutoff_rad if side < 13 else stage.sinc_cutoff_large_rad
        return ops.sinc_kernel(side, rng.uniform(*cutoff))
    probs = np.array([getattr(stage.blur_kinds, kind.name) for kind in fields(stage.blur_kinds)])
    kind = fields(stage.blur_kinds)[rng.choice(len(probs), p=probs / probs.sum())].name
    width = rng.uniform(*stage.blur_sigma_px)
    widths, rotation = (width, width), 0.0
    if kind.endswith("aniso"):
        widths, rotation = (width, rng.uniform(*stage.blur_sigma_px)), rng.uniform(-math.pi, math.pi)
    if kind.startswith("plateau"):
        beta = _draw_beta(stage.plateau_beta, rng)
        return ops.plateau_kernel(side, widths, rotation_rad=rotation, beta=beta)
    beta = _draw_beta(stage.generalized_beta, rng) if kind.startswith("generalized") else 1.0
    return ops.gaussian_kernel(side, widths, rotation_rad=rotation, beta=beta)


def _draw_kernel_side(largest: int, rng: np.random.Generator) -> int:
    return 2 * int(rng.integers(1, (largest + 1) // 2)) + 1


def _draw_beta(beta_range: tuple[float, float], rng: np.random.Generator) -> float:
    """Below or above 1 at even odds, uniform within each side, as Real-ESRGAN draws it."""
    low, high = beta_range
    return rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)


def _draw_size(base_size: tuple[int, int], stage: StageConfig, rng: np.random.Generator) -> tuple[int, int]:
    """The size after a stage's resize: base size times the drawn factor, rounded down, at least 1."""
    draw = rng.random()
    low, high = stage.resize_range
    factor = 1.0
    if draw < stage.resize_up_prob:
        factor = rng.uniform(1, high)
    elif draw < stage.resize_up_prob + stage.resize_down_prob:
        factor = rng.uniform(low, 1)
    height, width = (max(1, int(side * factor)) for side in base_size)
    return height, width


def _draw_resize_mode(rng: np.random.Generator) -> ops.ResizeMode:
    modes: tuple[ops.ResizeMode, ...] = get_args(ops.ResizeMode)
    return modes[rng.integers(len(modes))]


def _draw_quality(quality_range: tuple[float, float], rng: np.random.Generator) -> int:
    return round(rng.uniform(*quality_range))


def _add_noise(image: np.ndarray, stage: StageConfig, rng: np.random.Generator) -> np.ndarray:
    is_gaussian, is_grey = rng.random() < stage.gaussian_prob, rng.random() < stage.grey_prob
    if is_gaussian:
        return ops.add_gaussian_noise(image, rng.uniform(*stage.noise_std), is_grey=is_grey, rng=rng)
    return ops.add_poisson_noise(image, rng.uniform(*stage.poisson_scale), is_grey=is_grey, rng=rng)
