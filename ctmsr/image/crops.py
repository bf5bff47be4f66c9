"""Crops of decoded pictures: uint8, HWC, RGB, 0..255."""

import numpy as np

from ..errors import DataError


def random_crop(hr_u8: np.ndarray, size: int, rng: np.random.Generator, *, name: str) -> np.ndarray:
    """Square crop at a uniformly random position; a view unless padding is needed.

    A side shorter than `size` is first extended at its end by mirroring once, without repeating the edge.

    Args:
        hr_u8: uint8 of shape (height, width, 3).
        size: Side of the crop in pixels.
        rng: Source of the position.
        name: Identity of the picture, for the error message.

    Returns:
        uint8 of shape (size, size, 3).

    Raises:
        DataError: A side is shorter than size // 2 + 1, so mirroring once cannot fill the crop.
    """
    hr_u8 = _reflect_to(hr_u8, size, name)
    top, left = (int(rng.integers(side - size + 1)) for side in hr_u8.shape[:2])
    return hr_u8[top : top + size, left : left + size]


def center_crop(hr_u8: np.ndarray, size: int, *, name: str) -> np.ndarray:
    """As `random_crop`, but from the middle."""
    hr_u8 = _reflect_to(hr_u8, size, name)
    top, left = ((side - size) // 2 for side in hr_u8.shape[:2])
    return hr_u8[top : top + size, left : left + size]


def paired_crop(
    hr_u8: np.ndarray,
    lq_u8: np.ndarray,
    size: int,
    *,
    scale: int,
    rng: np.random.Generator | None,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Crops a picture and its LR picture at the same place: at random, or in the middle without `rng`.

    Args:
        hr_u8: uint8 of shape (height, width, 3).
        lq_u8: uint8, 1/scale of each side.
        size: Side of the HR crop in pixels, a multiple of `scale`.
        scale: HR/LQ ratio.
        rng: Source of the position.
        name: Identity of the picture, for the error message.

    Returns:
        uint8 of shape (size, size, 3) and (size // scale, size // scale, 3).

    Raises:
        DataError: The sides do not match, or one is shorter than the crop.
    """
    (height, width), (lq_height, lq_width) = hr_u8.shape[:2], lq_u8.shape[:2]
    if (height, width) != (scale * lq_height, scale * lq_width):
        raise DataError(
            f"{name} is {width}x{height} pixels and its LR picture {lq_width}x{lq_height}, not {scale} times "
            "smaller. Crop it, or leave the pair out."
        )
    if min(height, width) < size:
        raise DataError(
            f"{name} is {width}x{height} pixels, too small for a paired crop of {size}. Leave the pair "
            "out or lower the crop size."
        )
    spare = [side - size // scale for side in lq_u8.shape[:2]]
    top, left = (side // 2 if rng is None else int(rng.integers(side + 1)) for side in spare)
    rows, columns = (slice(start * scale, start * scale + size) for start in (top, left))
    lq_rows, lq_columns = (slice(start, start + size // scale) for start in (top, left))
    return hr_u8[rows, columns], lq_u8[lq_rows, lq_columns]


def random_flip(*images_u8: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The pictures as they are or, at even odds, all mirrored left to right, as views.

    For training crops, after the cut: an HR crop before it is degraded, or a pair together.

    Args:
        images_u8: uint8 HWC, of any sizes.
        rng: Source of the one decision, such as `sample_rng(seed, epoch, key, "flip")`.
    """
    return tuple(image[:, ::-1] for image in images_u8) if rng.random() < 0.5 else images_u8


def _reflect_to(hr_u8: np.ndarray, size: int, name: str) -> np.ndarray:
    height, width = hr_u8.shape[:2]
    if min(height, width) < size // 2 + 1:
        raise DataError(
            f"{name} is {width}x{height} pixels, too small for a crop of {size}: each side must be at least "
            f"{size // 2 + 1}. Leave the picture out or lower the crop size."
        )
    if min(height, width) >= size:
        return hr_u8
    return np.pad(hr_u8, ((0, max(0, size - height)), (0, max(0, size - width)), (0, 0)), mode="reflect")
