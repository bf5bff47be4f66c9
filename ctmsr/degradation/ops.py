"""Blur, resize, noise and JPEG: the operations of the degradation, each a pure function.

The recipe is that of Real-ESRGAN (Wang et al. 2021, arXiv:2107.10833, section 3). In this module and in
`recipe`, `image` is float32, HWC, RGB, in [0, 1] except where a filter overshoots.
"""

import math
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from scipy.special import j1, pdtr

ResizeMode = Literal["area", "bilinear", "bicubic"]

# Up to this many taps OpenCV filters directly; above it goes through a DFT, 2 to 4 times slower at our sizes.
_MAX_DIRECT_TAPS = 121

# Table entries per Poisson mean: more save search steps, fewer fit into the cache.
_NUM_BUCKETS = 1024


def gaussian_kernel(
    size: int, blur_sigma_px: tuple[float, float], *, rotation_rad: float = 0.0, beta: float = 1.0
) -> np.ndarray:
    """Generalised Gaussian kernel exp(-(x^T S^-1 x)^beta / 2), normalised.

    Args:
        size: Side in pixels, odd.
        blur_sigma_px: Widths along the two principal axes, above 0; S = R diag(widths^2) R^T.
        rotation_rad: Angle of R, from the x axis to the y axis.
        beta: Shape: 1 is the Gaussian, smaller has heavier tails, larger is flatter with a sharper edge.

    Returns:
        float32 of shape (size, size), summing to 1.
    """
    return _normalized(np.exp(-0.5 * _squared_distance(size, blur_sigma_px, rotation_rad) ** beta))


def plateau_kernel(
    size: int, blur_sigma_px: tuple[float, float], *, rotation_rad: float = 0.0, beta: float = 1.0
) -> np.ndarray:
    """Plateau-shaped kernel 1 / ((x^T S^-1 x)^beta + 1), normalised; arguments as in `gaussian_kernel`."""
    return _normalized(1 / (_squared_distance(size, blur_sigma_px, rotation_rad) ** beta + 1))


def sinc_kernel(size: int, cutoff_rad: float) -> np.ndarray:
    """Circular low-pass kernel w J1(w r) / (2 pi r), normalised; causes ringing and overshoot.

    Args:
        size: Side in pixels, odd.
        cutoff_rad: Cut-off frequency w in radians per pixel, in (0, pi]; lower cuts more.

    Returns:
        float32 of shape (size, size), summing to 1, with negative lobes.
    """
    radius = np.hypot(*_grid(size))
    center = size // 2
    radius[center, center] = 1.0  # any value but 0: overwritten by the limit below
    kernel = cutoff_rad * j1(cutoff_rad * radius) / (2 * math.pi * radius)
    kernel[center, center] = cutoff_rad**2 / (4 * math.pi)
    return _normalized(kernel)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size) - size // 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _squared_distance(size: int, blur_sigma_px: tuple[float, float], rotation_rad: float) -> np.ndarray:
    """x^T S^-1 x on the kernel's grid, by rotating the coordinates onto the principal axes of S."""
    x, y = _grid(size)
    cos, sin = math.cos(rotation_rad), math.sin(rotation_rad)
    return ((cos * x + sin * y) / blur_sigma_px[0]) ** 2 + ((cos * y - sin * x) / blur_sigma_px[1]) ** 2


def _normalized(kernel: np.ndarray) -> np.ndarray:
    kernel = kernel / kernel.sum()
    # Together such taps move a pixel by under 1/1000 of an 8-bit level. OpenCV skips zeros; the tails of a
    # narrow Gaussian are subnormal floats, which would make the filter up to ten times slower.
    kernel[np.abs(kernel) < 1e-8] = 0
    return np.asarray(kernel, dtype=np.float32)


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlates each channel with an odd square kernel; the border mirrors without repeating the edge."""
    size = kernel.shape[0]
    if kernel.size <= _MAX_DIRECT_TAPS:
        return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    # Strips of whole kernel rows, each few enough taps to be filtered directly.
    height, num_rows = image.shape[0], _MAX_DIRECT_TAPS // size
    padded = cv2.copyMakeBorder(image, size // 2, size // 2, 0, 0, cv2.BORDER_REFLECT_101)
    result = np.zeros_like(image)
    for top in range(0, size, num_rows):
        strip = kernel[top : top + num_rows]
        rows = padded[top : top + height + len(strip) - 1]
        anchor = (size // 2, 0)
        result += cv2.filter2D(rows, -1, strip, anchor=anchor, borderType=cv2.BORDER_REFLECT_101)[:height]
    return result


def resize(image: np.ndarray, size: tuple[int, int], mode: ResizeMode) -> np.ndarray:
    """Resamples to (height, width) without antialiasing, like torch's `F.interpolate(size=size, mode=mode)`.

    Bicubic has a = -0.75 and may overshoot [0, 1]. "area" averages all input pixels that an output pixel
    touches, even when enlarging: adaptive average pooling, not OpenCV's INTER_AREA.
    """
    if size == image.shape[:2]:
        return image
    if mode == "area":
        return _resize_area(image, size)
    interpolation = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[mode]
    return cv2.resize(image, (size[1], size[0]), interpolation=interpolation)


def _resize_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Each pass averages over the row axis and swaps the axes, so two passes restore the layout.
    for num_out in size:
        image = cv2.transpose(_average_rows(image, num_out))
    return image


def _average_rows(image: np.ndarray, num_out: int) -> np.ndarray:
    """Mean of the input rows first..last-1 that each output row's footprint touches."""
    num_in, index = image.shape[0], np.arange(num_out)
    first, last = index * num_in // num_out, -(-(index + 1) * num_in // num_out)
    total = image[first]
    for tap in range(1, int((last - first).max())):
        inside = first + tap < last
        total[inside] += image[first[inside] + tap]
    return total / (last - first)[:, None, None].astype(np.float32)


def add_gaussian_noise(
    image: np.ndarray, noise_std: float, *, is_grey: bool, rng: np.random.Generator
) -> np.ndarray:
    """Adds white Gaussian noise and clips to [0, 1].

    Args:
        image: float32 HWC.
        noise_std: Standard deviation in [0, 1] units.
        is_grey: One draw per pixel, shared by its channels, instead of one per channel.
        rng: Source of the noise.
    """
    shape = (*image.shape[:2], 1) if is_grey else image.shape
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(noise_std)
    return _clip(image + noise)


def add_poisson_noise(
    image: np.ndarray, poisson_scale: float, *, is_grey: bool, rng: np.random.Generator
) -> np.ndarray:
    """Adds scaled shot noise and clips to [0, 1].

    As Real-ESRGAN does: with x the image on the 8-bit grid and v the number of distinct levels in it, rounded
    up to a power of two, the noise is scale * (Poisson(v x) / v - x).

    Args:
        image: float32 HWC.
        poisson_scale: Factor on the noise, at least 0; 1 is true shot noise of v photons at white.
        is_grey: Noise of the luma, shared by the channels, instead of separate noise per channel.
        rng: Source of the noise.
    """
    source = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if is_grey else image
    levels = u8_from_unit(source)
    num_levels = np.count_nonzero(np.bincount(levels.ravel()))
    peak = 2 ** math.ceil(math.log2(num_levels))
    noise = _draw_poisson(levels, peak, rng) / np.float32(peak) - unit_from_u8(levels)
    return _clip(image + np.float32(poisson_scale) * noise)


def _draw_poisson(levels: np.ndarray, peak: int, rng: np.random.Generator) -> np.ndarray:
    """Poisson counts of mean peak * level / 255, by inverting the distribution function.

    As there are only 256 means, a table lets the search start next to its end; bisection ends it for the few
    draws far out in a tail. Exact to the 24 bits of a float32 draw, and several times as fast as
    `Generator.poisson`, by far the slowest operation before.
    """
    cdf, starts = _poisson_tables(peak)
    level, draw = levels.ravel().astype(np.int32), rng.random(levels.size, dtype=np.float32)
    bucket = (draw * _NUM_BUCKETS).astype(np.int32)
    row = level * cdf.shape[1]  # places in the flat tables: `take` is far faster than two indices
    place = row + starts.take(level * _NUM_BUCKETS + bucket)
    short = np.flatnonzero(cdf.take(place) <= draw)
    for _ in range(4):
        place[short] += 1
        short = short[cdf.take(place.take(short)) <= draw.take(short)]
    low, high, sought = place.take(short), row.take(short) + cdf.shape[1] - 1, draw.take(short)
    while (high - low > 1).any():
        middle = (low + high) // 2
        is_short = cdf.take(middle) <= sought
        low, high = np.where(is_short, middle, low), np.where(is_short, high, middle)
    place[short] = high
    return (place - row).astype(np.int16).reshape(levels.shape)  # int16 keeps the caller in float32


@lru_cache(maxsize=9)  # one entry per peak: 1, 2, 4 ... 256; 5 MB in all
def _poisson_tables(peak: int) -> tuple[np.ndarray, np.ndarray]:
    """For each level: P(count <= k) for every k, and the smallest count for a draw in each bucket."""
    means = np.arange(256)[:, None] * (peak / 255)
    counts = np.arange(int(peak + 7 * math.sqrt(peak) + 20))  # beyond: less than 2^-24
    cdf = pdtr(counts, means).astype(np.float32)
    cdf[:, -1] = 1
    buckets = np.arange(_NUM_BUCKETS) / _NUM_BUCKETS
    starts = np.stack([np.searchsorted(row, buckets, side="right") for row in cdf])
    return cdf, starts.astype(np.int16)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Encodes and decodes as a baseline JPEG (libjpeg, 4:2:0), quality 1 to 100.

    Real-ESRGAN uses a differentiable approximation that skips the rounding to 8 bits on both sides. No
    gradient is needed here, and real pictures have been through the real codec.
    """
    bgr = cv2.cvtColor(u8_from_unit(image), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None  # our own bytes
    return unit_from_u8(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def unit_from_u8(image_u8: np.ndarray) -> np.ndarray:
    """uint8 in 0..255 to float32 in [0, 1], same layout."""
    return image_u8.astype(np.float32) / np.float32(255)


def u8_from_unit(image: np.ndarray) -> np.ndarray:
    """Floats, clipped to [0, 1], to uint8 in 0..255, rounded to the nearest level, same layout."""
    return np.asarray(np.rint(_clip(image) * 255), dtype=np.uint8)


def _clip(image: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(image, 0, 1))
