"""Standard normal noise as a function of (seed, position): any part of it in one call, on any device.

Version 2 is SplitMix64 (Steele, Lea and Flood 2014), indexed by counter instead of read in order, and the
Box-Muller transform. Its integers are the same on CPUs and GPUs; the noise differs only in the last bits of
logarithms and cosines. Version 1, torch's own generators, differs between devices; runs and models that
began with it keep it.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..rng import sample_seed
from .device import upload

NoiseVersion = Literal[1, 2]

_BLOCK_PX = 256
"""Block size of version 1; changing it would change the noise of every seed."""


def normal(
    seeds: Sequence[int], shape: tuple[int, ...], device: torch.device, version: NoiseVersion = 2
) -> Tensor:
    """Standard normal noise of `shape` for every seed, each independent of the other seeds.

    Args:
        seeds: Each in [0, 2^63).
        shape: Shape of one seed's noise; the number of elements must be even.
        device: Where to generate it.
        version: Version of the generator.

    Returns:
        float32 (number of seeds, *shape).
    """
    if version == 1:
        noise = torch.empty(len(seeds), *shape, device=device)
        generator = torch.Generator(device)
        for row, seed in zip(noise, seeds, strict=True):
            row.normal_(generator=generator.manual_seed(seed))
        return noise
    size = math.prod(shape)
    assert size % 2 == 0, f"an odd number of elements: {shape}"
    keys = upload(torch.tensor(seeds, dtype=torch.int64), device)
    return _pairs(keys[:, None], torch.arange(size // 2, device=device)).reshape(len(seeds), *shape)


def position_noise(
    seed: int, rows: slice, columns: slice, device: torch.device | None = None, version: NoiseVersion = 2
) -> Tensor:
    """Standard normal noise that depends only on seed and position, not on how a picture is tiled.

    Args:
        seed: The picture's seed.
        rows: First and past-the-end row in HR pixels, below 2^28.
        columns: First and past-the-end column in HR pixels, below 2^28.
        device: Where to generate it; the CPU by default.
        version: Version of the generator.

    Returns:
        float32 (3, rows, columns).
    """
    if version == 1:
        return _position_noise_1(seed, rows, columns).to(device)
    if device is not None and device.type == "mps":  # nobody has tested its arithmetic of 64-bit integers
        return position_noise(seed, rows, columns).to(device)
    first, last = columns.start // 2, -(-columns.stop // 2)  # two neighbours share a counter
    channel = torch.arange(3, device=device)[:, None, None] << 56
    row = torch.arange(rows.start, rows.stop, device=device)[:, None] << 28
    seeds = torch.full((1,), seed, device=device)  # on the device: copying a number would make the host wait
    noise = _pairs(seeds, channel + row + torch.arange(first, last, device=device)).flatten(2)
    return noise[:, :, columns.start - 2 * first : columns.stop - 2 * first]


def _pairs(seeds: Tensor, counters: Tensor) -> Tensor:
    """Two independent standard normal numbers per seed and counter, in the last dimension."""
    keys = _mix(seeds + _signed(0x9E3779B97F4A7C15))
    bits = _mix(keys + (counters + 1) * _signed(0x9E3779B97F4A7C15))
    first, second = _shifted(bits, 32), bits & 0xFFFFFFFF
    radius = torch.sqrt(-2 * torch.log((first.float() + 0.5) * 2.0**-32))
    angle = second.float() * (2 * math.pi * 2.0**-32)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's bijection of 64 bits: every input bit affects half of the output bits. int64 wraps."""
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)  # the constants have 64 bits, the first of them set


def _position_noise_1(seed: int, rows: slice, columns: slice) -> Tensor:
    first_row, first_column = rows.start // _BLOCK_PX, columns.start // _BLOCK_PX
    blocks = [
        torch.cat([_block(seed, r, c) for c in range(first_column, -(-columns.stop // _BLOCK_PX))], dim=2)
        for r in range(first_row, -(-rows.stop // _BLOCK_PX))
    ]
    top, left = first_row * _BLOCK_PX, first_column * _BLOCK_PX
    noise = torch.cat(blocks, dim=1)
    return noise[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _block(seed: int, row: int, column: int) -> Tensor:
    generator = torch.Generator().manual_seed(sample_seed(seed, row, column))
    return torch.randn(3, _BLOCK_PX, _BLOCK_PX, generator=generator)
