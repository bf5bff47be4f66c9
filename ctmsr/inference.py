"""One-step super-resolution of one picture of any size, tiling included."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import check
from .image import to_tensor, to_u8, upsample
from .network import ConsistencyModel
from .rng import sample_seed

NOISE_BLOCK_PX = 256  # part of what a seed means: another value is another noise field


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How a picture is upscaled. By default it is the network's own pixels, as in the published inference."""

    tile: int = 256
    """Largest side given to the network, in LQ pixels; the published network takes about 3 GB for 256."""
    overlap: int = 64
    """Least overlap of neighbouring tiles, in LQ pixels."""
    colour_hold_px: float = 0.0
    """Above 0: structures wider than a Gaussian of this deviation, in LQ pixels, keep the input's colour."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's arithmetic: bf16 is faster on GPUs, and moves pixels by about one level of 255."""

    def __post_init__(self) -> None:
        check(
            0 <= self.colour_hold_px <= 64,
            f"inference.colour_hold_px must be in [0, 64], got {self.colour_hold_px}.",
        )


@torch.inference_mode()
def upscale(
    model: ConsistencyModel,
    lq_u8: np.ndarray,
    *,
    sigma_max: float,
    seed: int = 0,
    config: InferenceConfig = InferenceConfig(),
) -> np.ndarray:
    """f(lq_up + sigma_max · eps, sigma_max, lq): one network call a tile (arXiv:2503.20349).

    The picture is reflect-padded at the bottom and right to a multiple of `model.config.multiple`. Noise and
    `lq_up` belong to the picture, not to the tile, so where tiles overlap they differ only by the network's
    view. The published inference averages overlaps evenly; here they are cross-faded, which leaves no step
    where a tile begins.

    Args:
        model: In eval mode; the work is done on the device of its parameters.
        lq_u8: uint8 (h, w, 3), RGB, sides from 1 up.
        sigma_max: Noise level of the trajectory's LR end that the model was trained with.
        seed: Picks the noise; the same seed gives the same picture.
        config: Tiles, rounded down to the network's multiple, and colour.

    Returns:
        uint8 (scale·h, scale·w, 3).

    Raises:
        ValueError: The array is not such a picture, or `model` is in training mode.
        ConfigError: The tile does not exceed the overlap by the network's multiple.
    """
    if lq_u8.dtype != np.uint8 or lq_u8.ndim != 3 or lq_u8.shape[2] != 3 or lq_u8.size == 0:
        raise ValueError(f"lq_u8 must be uint8 of shape (h, w, 3), got {lq_u8.dtype} {lq_u8.shape}.")
    if model.training:
        raise ValueError(
            "the model is in training mode, its dropout would change the picture. Call model.eval()."
        )
    scale, multiple = model.config.scale, model.config.multiple
    height, width = lq_u8.shape[:2]
    padding = ((0, -height % multiple), (0, -width % multiple), (0, 0))
    lq = to_tensor(np.pad(lq_u8, padding, mode="reflect")[None])  # a side of 1 repeats its pixel
    lq_up = upsample(lq, scale)
    sigma = torch.tensor([sigma_max], dtype=torch.float32)
    device = next(model.parameters()).device
    rows, columns = (
        tile_spans(side, tile=config.tile, overlap=config.overlap, multiple=multiple) for side in lq.shape[2:]
    )
    sr = torch.empty_like(lq_up[0])
    for top, bottom in rows:
        band = torch.empty_like(sr[:, scale * top : scale * bottom])
        for left, right in columns:
            y, x = slice(scale * top, scale * bottom), slice(scale * left, scale * right)
            x_t = lq_up[:, :, y, x] + sigma_max * position_noise(seed, y, x)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                out = model(x_t.to(device), sigma.to(device), lq[:, :, top:bottom, left:right].to(device))
            _cross_fade(band, out[0].cpu(), scale * left, scale * config.overlap, axis=2)
        _cross_fade(sr, band, scale * top, scale * config.overlap, axis=1)
    if config.colour_hold_px:
        sr += _low_pass(lq_up[0] - sr, scale * config.colour_hold_px)
    sr_u8: np.ndarray = to_u8(sr[None, :, : scale * height, : scale * width])[0]
    return sr_u8


def tile_spans(side: int, *, tile: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles along one side; every start is a multiple of `multiple`.

    Args:
        side: Padded side of the picture, a multiple of `multiple`.
        tile: Largest tile, rounded down to a multiple.
        overlap: Least overlap of neighbours.
        multiple: What the network's sides must be a multiple of.

    Raises:
        ConfigError: `tile` does not exceed `overlap` by `multiple`.
    """
    size = tile // multiple * multiple
    stride = (size - overlap) // multiple * multiple
    check(
        overlap >= 0 and stride > 0,
        f"inference.tile must exceed inference.overlap by at least {multiple}, the network's multiple, and "
        f"overlap must not be negative; got tile {tile}, overlap {overlap}.",
    )
    if side <= size:
        return [(0, side)]
    starts = [*range(0, side - size, stride), side - size]
    return [(start, start + size) for start in starts]


def position_noise(seed: int, rows: slice, columns: slice) -> Tensor:
    """Standard normal noise that depends on the seed and the position alone, not on how a picture is cut.

    Args:
        seed: The picture's seed.
        rows: First and past-the-end row in HR pixels.
        columns: First and past-the-end column in HR pixels.

    Returns:
        float32 (3, rows, columns).
    """
    first_row, first_column = rows.start // NOISE_BLOCK_PX, columns.start // NOISE_BLOCK_PX
    blocks = [
        torch.cat(
            [_noise_block(seed, r, c) for c in range(first_column, -(-columns.stop // NOISE_BLOCK_PX))], dim=2
        )
        for r in range(first_row, -(-rows.stop // NOISE_BLOCK_PX))
    ]
    top, left = first_row * NOISE_BLOCK_PX, first_column * NOISE_BLOCK_PX
    noise = torch.cat(blocks, dim=1)
    return noise[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _noise_block(seed: int, row: int, column: int) -> Tensor:
    generator = torch.Generator().manual_seed(sample_seed(seed, row, column))
    return torch.randn(3, NOISE_BLOCK_PX, NOISE_BLOCK_PX, generator=generator)


def _cross_fade(canvas: Tensor, piece: Tensor, start: int, overlap: int, *, axis: int) -> None:
    """Writes `piece` into `canvas` from `start` along `axis`, fading over within the first `overlap`.

    Where both agree the result is exactly what both say: lerp adds a multiple of their difference.
    """
    overlap = overlap if start else 0
    weight = (torch.arange(overlap) + 0.5) / max(1, overlap)
    weight = weight.reshape([overlap if i == axis else 1 for i in range(piece.ndim)])
    seam = canvas.narrow(axis, start, overlap)
    seam.lerp_(piece.narrow(axis, 0, overlap), weight.expand_as(seam))
    rest = piece.shape[axis] - overlap
    canvas.narrow(axis, start + overlap, rest).copy_(piece.narrow(axis, overlap, rest))


def _low_pass(image: Tensor, std_px: float) -> Tensor:
    """Gaussian blur of (C, H, W), cut at three standard deviations, the edge pixels repeated outwards."""
    radius = math.ceil(3 * std_px)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / std_px) ** 2)
    weights = (weights / weights.sum()).reshape(1, 1, 1, -1)
    for _ in range(2):  # along the rows, then, transposed, along the columns
        image = F.conv2d(F.pad(image[:, None], (radius, radius, 0, 0), mode="replicate"), weights)[:, 0].mT
    return image
