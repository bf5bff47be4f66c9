"""One-step super-resolution of one picture of any size, tiling included."""

import logging
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check
from ..image.ranges import to_tensor, to_u8, to_u16, upsample
from .device import keep_freed_memory, use_fast_math
from .network import ConsistencyModel, bf16_copy
from .noise import NoiseVersion, position_noise

logger = logging.getLogger(__name__)

_STRIP_ROWS = 64
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "could not create a primitive",
)
"""In the messages of CUDA and MPS, of torch's allocator on Linux and Windows, and of oneDNN."""


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How a picture is upscaled. By default the result is the network's own pixels, as published."""

    tile: int = 256
    """Largest side passed to the network, in LQ pixels; the published network needs about 3 GB for 256."""
    overlap: int = 64
    """Minimum overlap of neighbouring tiles, in LQ pixels."""
    colour_hold_px: float = 0.0
    """If above 0, structures wider than a Gaussian of this deviation, in LQ px, keep the input's colour."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network: bf16 is faster on GPUs and changes pixels by about one level of 255."""
    batch_tiles: int = 1
    """Tiles per network call; more is faster on a GPU that a single tile does not fill."""
    noise_version: NoiseVersion = 2
    """Which noise a seed stands for; models released before 0.2 have version 1."""

    def __post_init__(self) -> None:
        check(
            0 <= self.colour_hold_px <= 64,
            f"inference.colour_hold_px must be in [0, 64], got {self.colour_hold_px}.",
        )
        check(self.batch_tiles >= 1, f"inference.batch_tiles must be at least 1, got {self.batch_tiles}.")


def for_inference(
    model: ConsistencyModel, device: str | torch.device, config: InferenceConfig
) -> ConsistencyModel:
    """The model in eval mode on `device`, in the fastest form for `upscale`.

    On a GPU, its memory format is channels last, its weights have `config.precision`, and this process
    multiplies float32 matrices in TF32. On other devices it is the model itself, and this process keeps the
    memory that it frees: see `keep_freed_memory`.
    """
    model = model.eval().to(device)
    if torch.device(device).type != "cuda":
        keep_freed_memory()
        return model
    use_fast_math()
    model = bf16_copy(model) if config.precision == "bf16" else model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


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
    `lq_up` belong to the picture, not to the tile, so overlapping tiles differ only in the context that the
    network sees. The published inference averages overlaps evenly; here they are cross-faded, which leaves no
    step at the edge of a tile.

    If a GPU or the host runs out of memory, this retries with half the tiles per call, finally with smaller
    tiles, and logs once which settings fit.

    Args:
        model: In eval mode, on the device to compute on; fastest if it comes from `for_inference`.
        lq_u8: uint8 (h, w, 3), RGB, with sides of at least 1; or uint16, which is nowhere rounded to 8 bits.
        sigma_max: Noise level at the LR end of the trajectory that the model was trained with.
        seed: Selects the noise; the same seed gives the same picture.
        config: Tile size, rounded down to the network's multiple, and the other settings.

    Returns:
        (scale·h, scale·w, 3), uint8 or uint16 like `lq_u8`.

    Raises:
        ValueError: The array is not such a picture, or `model` is in training mode.
        ConfigError: The tile does not exceed the overlap by the network's multiple.
        RuntimeError, MemoryError: There is not enough memory for even one tile of the smallest size:
            `is_out_of_memory` holds for the error.
    """
    if lq_u8.dtype not in (np.uint8, np.uint16) or lq_u8.ndim != 3 or lq_u8.shape[2] != 3 or lq_u8.size == 0:
        raise ValueError(
            f"lq_u8 must be uint8 or uint16 of shape (h, w, 3), got {lq_u8.dtype} {lq_u8.shape}."
        )
    if model.training:
        raise ValueError(
            "the model is in training mode, so dropout would change the picture. Call model.eval()."
        )
    fitting = config
    while True:
        try:
            sr = _upscaled(model, lq_u8, sigma_max, seed, fitting)
            break
        except (RuntimeError, MemoryError) as error:
            smaller = _smaller(fitting, model.config.multiple, max(lq_u8.shape))
            if smaller is None or not is_out_of_memory(error):
                raise
        fitting = smaller  # outside the handler, whose traceback keeps the memory allocated
    if fitting != config:
        _warn_once(config.tile, config.batch_tiles, fitting.tile, fitting.batch_tiles)
    to_levels = to_u8 if lq_u8.dtype == np.uint8 else to_u16
    sr_levels: np.ndarray = to_levels(sr[None])[0]
    return sr_levels


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host had no memory left; only for CUDA does torch have a class of its own."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(mark in text for mark in _OUT_OF_MEMORY)
    )


@lru_cache
def _warn_once(tile: int, batch_tiles: int, fitting_tile: int, fitting_batch_tiles: int) -> None:
    logger.warning(
        "memory ran out with inference.tile=%d, inference.batch_tiles=%d, but not with "
        "inference.tile=%d, inference.batch_tiles=%d. Set these to avoid the retries.",
        *(tile, batch_tiles, fitting_tile, fitting_batch_tiles),
    )


def _upscaled(
    model: ConsistencyModel, lq_u8: np.ndarray, sigma_max: float, seed: int, config: InferenceConfig
) -> Tensor:
    """(3, scale·h, scale·w), roughly in [-1, 1], on the model's device."""
    scale, multiple = model.config.scale, model.config.multiple
    weights = next(model.parameters())
    device = weights.device
    height, width = lq_u8.shape[:2]
    padding = ((0, -height % multiple), (0, -width % multiple), (0, 0))
    padded = np.pad(lq_u8, padding, mode="reflect")[None]  # a side of 1 repeats its pixel
    levels = torch.from_numpy(padded)  # on their way to a GPU, bytes are less than floats
    lq = to_tensor(levels.to(device)) if lq_u8.dtype == np.uint8 else to_tensor(levels).to(device)
    lq_up = upsample(lq, scale, num_bits=8 * lq_u8.itemsize)
    rows, columns = (
        tile_spans(side, tile=config.tile, overlap=config.overlap, multiple=multiple) for side in lq.shape[2:]
    )
    places = [(slice(*row), slice(*column)) for row in rows for column in columns]
    casts = config.precision == "bf16" and weights.dtype == torch.float32
    sr, band = torch.empty_like(lq_up[0]), torch.empty(0)
    for first in range(0, len(places), config.batch_tiles):
        some = places[first : first + config.batch_tiles]  # all are of one size
        x_t = torch.cat([_noisy(lq_up, place, scale, sigma_max, seed, config) for place in some])
        sigma = torch.full((1,), sigma_max, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=casts):
            outs = model(x_t, sigma, torch.cat([lq[:, :, row, column] for row, column in some]))
        for (row, column), out in zip(some, outs, strict=True):
            if column.start == 0:
                band = torch.empty_like(sr[:, : out.shape[1]])
            _cross_fade(band, out, scale * column.start, scale * config.overlap, axis=2)
            if scale * column.stop == band.shape[2]:
                _cross_fade(sr, band, scale * row.start, scale * config.overlap, axis=1)
    if config.colour_hold_px:
        sr += low_pass(lq_up - sr, scale * config.colour_hold_px)[0]
    return sr[:, : scale * height, : scale * width]


def _noisy(
    lq_up: Tensor,
    place: tuple[slice, slice],
    scale: int,
    sigma_max: float,
    seed: int,
    config: InferenceConfig,
) -> Tensor:
    """x_t of one tile, (1, 3, scale·h, scale·w)."""
    y, x = (slice(scale * span.start, scale * span.stop) for span in place)
    return lq_up[:, :, y, x] + sigma_max * position_noise(seed, y, x, lq_up.device, config.noise_version)


def _smaller(config: InferenceConfig, multiple: int, side: int) -> InferenceConfig | None:
    """The settings to try next after running out of memory; None if there are none."""
    if config.batch_tiles > 1:
        return replace(config, batch_tiles=config.batch_tiles // 2)
    tile = min(config.tile, side + -side % multiple)
    least = -(-config.overlap // multiple) * multiple + multiple
    half = max(tile // 2 // multiple * multiple, least)
    return replace(config, tile=half) if half < tile // multiple * multiple else None


def tile_spans(side: int, *, tile: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles along one side; every start is a multiple of `multiple`.

    Args:
        side: Padded side of the picture, a multiple of `multiple`.
        tile: Largest tile, rounded down to a multiple.
        overlap: Minimum overlap of neighbours.
        multiple: The network's sides must be multiples of this.

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


def _cross_fade(canvas: Tensor, piece: Tensor, start: int, overlap: int, *, axis: int) -> None:
    """Writes `piece` into `canvas` at `start` along `axis`, cross-fading over the first `overlap` elements.

    Where both agree, the result is exact: lerp adds a multiple of their difference.
    """
    overlap = overlap if start else 0
    weight = (torch.arange(overlap, device=canvas.device) + 0.5) / max(1, overlap)
    weight = weight.reshape([overlap if i == axis else 1 for i in range(piece.ndim)])
    seam = canvas.narrow(axis, start, overlap)
    seam.lerp_(piece.narrow(axis, 0, overlap), weight.expand_as(seam))
    rest = piece.shape[axis] - overlap
    canvas.narrow(axis, start + overlap, rest).copy_(piece.narrow(axis, overlap, rest))


def low_pass(images: Tensor, std_px: float) -> Tensor:
    """Gaussian blur of (N, C, H, W), cut at three standard deviations, the edge pixels repeated outwards."""
    radius = math.ceil(3 * std_px)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / std_px) ** 2)
    weights = (weights / weights.sum()).reshape(1, 1, 1, -1)
    planes = images.flatten(0, 1)[:, None]
    for _ in range(2):  # along the rows, then, transposed, along the columns
        padded = F.pad(planes, (radius, radius, 0, 0), mode="replicate")
        # In strips, which gives the same bits: torch copies an input of conv2d 16-fold. But an exported graph
        # would keep the number of strips of the picture it was traced with.
        strips = [padded] if torch.onnx.is_in_onnx_export() else padded.split(_STRIP_ROWS, dim=2)
        planes = torch.cat([F.conv2d(strip, weights) for strip in strips], dim=2).transpose(2, 3)
    return planes.reshape(images.shape)
