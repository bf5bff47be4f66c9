"""A plain implementation of the degradation: on batches of float tensors, like the authors' code.

Kernels are drawn per image in numpy, padded to 21 pixels and applied by a grouped convolution. Size and mode
of a resize, and the kind of noise, are drawn once per batch. Noise is computed both in grey and in colour,
and one of the two selected. JPEG is the differentiable stand-in: 8x8 DCT by a tensor product, on 4:2:0
chroma.
"""

import math
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctmsr.degradation.config import DegradationConfig, StageConfig
from ctmsr.degradation.ops import ResizeMode, sinc_kernel
from ctmsr.degradation.recipe import _draw_kernel, _draw_kernel_side

KERNEL_PX = 21

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""Quantisation of luma at quality 50, ITU-T T.81 annex K."""


def degrade_batch(
    hr_u8: np.ndarray, scale: int, config: DegradationConfig, rng: np.random.Generator
) -> np.ndarray:
    """A degraded version of every image of a batch.

    Args:
        hr_u8: uint8 (N, H, W, 3); sides are multiples of `scale`.
        scale: HR/LQ ratio.
        config: Probabilities and ranges.
        rng: Draws kernels and choices; torch's global generator draws the noise.

    Returns:
        uint8 (N, H // scale, W // scale, 3).
    """
    image = torch.from_numpy(hr_u8).permute(0, 3, 1, 2).contiguous().float() / 255
    size = (image.shape[2], image.shape[3])
    lq_size = (size[0] // scale, size[1] // scale)
    image = _stage(image, size, config.stage1, rng)
    image = _stage(image, lq_size, config.stage2, rng)
    sinc = torch.stack([_sinc(config, rng) for _ in image])
    mode = _mode(rng)
    if rng.random() < config.final_jpeg_last_prob:
        image = _filter(_resize(image, lq_size, mode), sinc)
        image = _jpeg(image, config.final_jpeg_quality, rng)
    else:
        image = _jpeg(image, config.final_jpeg_quality, rng)
        image = _filter(_resize(image, lq_size, mode), sinc)
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def _stage(image: Tensor, base: tuple[int, int], stage: StageConfig, rng: np.random.Generator) -> Tensor:
    if rng.random() >= stage.prob:
        return image
    if rng.random() < stage.blur_prob:
        image = _filter(image, torch.stack([_padded(_draw_kernel(stage, rng)) for _ in image]))
    draw, factor = rng.random(), 1.0
    low, high = stage.resize_range
    if draw < stage.resize_up_prob:
        factor = rng.uniform(1, high)
    elif draw < stage.resize_up_prob + stage.resize_down_prob:
        factor = rng.uniform(low, 1)
    image = _resize(image, (max(1, int(base[0] * factor)), max(1, int(base[1] * factor))), _mode(rng))
    if rng.random() < stage.gaussian_prob:
        image = _gaussian(image, stage, rng)
    else:
        image = _poisson(image, stage, rng)
    if rng.random() < stage.jpeg_prob:
        image = _jpeg(image, stage.jpeg_quality, rng)
    return image


def _mode(rng: np.random.Generator) -> str:
    modes = get_args(ResizeMode)
    return modes[rng.integers(len(modes))]


def _sinc(config: DegradationConfig, rng: np.random.Generator) -> Tensor:
    if rng.random() >= config.final_sinc_prob:
        pulse = torch.zeros(KERNEL_PX, KERNEL_PX)
        pulse[KERNEL_PX // 2, KERNEL_PX // 2] = 1
        return pulse
    side = _draw_kernel_side(config.final_max_sinc_kernel_px, rng)
    return _padded(sinc_kernel(side, rng.uniform(*config.final_sinc_cutoff_rad)))


def _padded(kernel: np.ndarray) -> Tensor:
    return torch.from_numpy(np.pad(kernel, (KERNEL_PX - len(kernel)) // 2))


def _filter(image: Tensor, kernels: Tensor) -> Tensor:
    n, channels, height, width = image.shape
    pad = KERNEL_PX // 2
    mode = "reflect" if min(height, width) > pad else "replicate"
    padded = F.pad(image, (pad, pad, pad, pad), mode=mode)
    grouped = padded.view(1, n * channels, *padded.shape[2:])
    weights = kernels.view(n, 1, KERNEL_PX, KERNEL_PX).repeat(1, channels, 1, 1)
    weights = weights.view(n * channels, 1, KERNEL_PX, KERNEL_PX)
    return F.conv2d(grouped, weights, groups=n * channels).view(n, channels, height, width)


def _resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(image, size=size, mode=mode)


def _is_grey(image: Tensor, stage: StageConfig) -> Tensor:
    return (torch.rand(len(image)) < stage.grey_prob).float().view(-1, 1, 1, 1)


def _gaussian(image: Tensor, stage: StageConfig, rng: np.random.Generator) -> Tensor:
    low, high = stage.noise_std
    std = (torch.rand(len(image)) * (high - low) + low).view(-1, 1, 1, 1)
    is_grey = _is_grey(image, stage)
    noise = torch.randn_like(image) * std
    if is_grey.any():
        grey = torch.randn(len(image), 1, *image.shape[2:]) * std
        noise = noise * (1 - is_grey) + grey * is_grey
    return (image + noise).clamp(0, 1)


def _poisson(image: Tensor, stage: StageConfig, rng: np.random.Generator) -> Tensor:
    low, high = stage.poisson_scale
    factor = (torch.rand(len(image)) * (high - low) + low).view(-1, 1, 1, 1)
    is_grey = _is_grey(image, stage)
    image = image.clamp(0, 1)
    noise = _shot_noise((image * 255).round() / 255)
    if is_grey.any():
        luma = (image * torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        grey = _shot_noise((luma * 255).round() / 255)
        noise = noise * (1 - is_grey) + grey * is_grey
    return (image + factor * noise).clamp(0, 1)


def _shot_noise(image: Tensor) -> Tensor:
    peaks = [2 ** math.ceil(math.log2(len(torch.unique(each)))) for each in image]
    peak = torch.tensor(peaks, dtype=torch.float32).view(-1, 1, 1, 1)
    return torch.poisson(image * peak) / peak - image


def _dct_basis() -> tuple[Tensor, Tensor]:
    """The 8x8x8x8 tensor of the DCT, and the outer product of its scale factors."""
    x = torch.arange(8).float()
    cosine = torch.cos((2 * x[:, None] + 1) * x[None, :] * math.pi / 16)
    alpha = torch.ones(8)
    alpha[0] = 1 / math.sqrt(2)
    return torch.einsum("xu,yv->xyuv", cosine, cosine), torch.outer(alpha, alpha)


_BASIS, _ALPHA = _dct_basis()
_LUMA_TABLE = torch.tensor(_LUMA).float()
_CHROMA_TABLE = torch.full((8, 8), 99.0)
_CHROMA_TABLE[:4, :4] = torch.tensor(
    [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
).float()
_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_TO_RGB = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]])
_CHROMA_ZERO = torch.tensor([0.0, 128.0, 128.0])


def _jpeg(image: Tensor, quality: tuple[float, float], rng: np.random.Generator) -> Tensor:
    n, _, height, width = image.shape
    drawn = rng.uniform(*quality, size=n)
    factor = torch.tensor([5000 / q if q < 50 else 200 - 2 * q for q in drawn], dtype=torch.float32) / 100
    image = F.pad(image.clamp(0, 1), (0, -width % 16, 0, -height % 16))
    ycc = torch.tensordot(image.permute(0, 2, 3, 1) * 255, _TO_YCC, dims=([3], [1])) + _CHROMA_ZERO
    chroma = F.avg_pool2d(ycc[..., 1:].permute(0, 3, 1, 2), 2)
    planes = [(ycc[..., 0], _LUMA_TABLE), (chroma[:, 0], _CHROMA_TABLE), (chroma[:, 1], _CHROMA_TABLE)]
    y, *chroma_planes = (_quantised(plane, table, factor) for plane, table in planes)
    full = [plane.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) for plane in chroma_planes]
    back = torch.tensordot(torch.stack([y, *full], dim=3) - _CHROMA_ZERO, _TO_RGB, dims=([3], [1]))
    return (back.clamp(0, 255) / 255).permute(0, 3, 1, 2)[:, :, :height, :width].contiguous()


def _quantised(plane: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """A plane (N, H, W) in 0..255 after DCT, rounding to multiples from the table, and inverse DCT."""
    n, height, width = plane.shape
    blocks = plane.view(n, height // 8, 8, width // 8, 8).permute(0, 1, 3, 2, 4).reshape(n, -1, 8, 8)
    coefficients = 0.25 * _ALPHA * torch.tensordot(blocks - 128, _BASIS, dims=2)
    step = table * factor.view(-1, 1, 1, 1)
    coefficients = torch.round(coefficients / step) * step * _ALPHA
    blocks = 0.25 * torch.tensordot(coefficients, _BASIS.permute(2, 3, 0, 1), dims=2) + 128
    blocks = blocks.view(n, height // 8, width // 8, 8, 8).permute(0, 1, 3, 2, 4)
    return blocks.reshape(n, height, width)
