"""Converts the colours of a picture file to sRGB, whatever colour space the file declares.

LittleCMS converts 8-bit pictures by their ICC profile, as a browser does: perceptual intent. For 16-bit
pictures, and for what PNG declares without a profile, see `rgb_space.py`.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import numpy as np
from PIL import Image, ImageCms

from . import rgb_space
from .rgb_space import CURVES, LEVELS, PRIMARIES, SRGB_PRIMARIES, RgbSpace

Converter = Callable[[np.ndarray], np.ndarray]
"""Takes uint8 or uint16 pixels (height, width, channels) and returns sRGB of the same depth: 1 channel for a
grey picture, else 3."""

MAX_PROFILE_BYTES = 8 << 20
"""Largest ICC profile used; those of printing presses have 3 MB."""
_SPACES = {"L": ("GRAY", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",), "LAB": ("Lab",)}
"""What a profile may be for, by Pillow mode of the picture. Grey pictures often carry a profile for RGB."""
_PIXELS_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class ColourTags:
    """What a picture file says about its colours; None where it says nothing."""

    cicp: tuple[int, int, int, int] | None = None
    """Primaries, curve, matrix and full range, as numbers of ITU-T H.273."""
    icc: bytes | None = None
    """Profile; empty if there is one that cannot be unpacked."""
    is_srgb: bool = False
    gamma: float | None = None
    """Of PNG's gAMA: the exponent with which the picture was encoded."""
    chromaticities: tuple[float, ...] | None = None
    """Of PNG's cHRM: x, y of white, red, green and blue."""


class ColourError(ValueError):
    """A declaration that cannot be followed."""


def find_converter(mode: str, is_deep: bool, tags: ColourTags) -> tuple[Converter | None, list[str]]:
    """How to convert a picture to sRGB, by the first declaration that can be followed, in PNG's order.

    Args:
        mode: Of Pillow: L, RGB, CMYK or LAB.
        is_deep: Whether pixels have 16 bits instead of 8; not for CMYK and LAB.
        tags: The declarations.

    Returns:
        The converter, or None if pixels are sRGB as they are; and why declarations were not followed.
    """
    problems = []
    for find in (_by_cicp, _by_icc, _as_srgb, _by_gamma):
        try:
            found = find(mode, is_deep, tags)
        except ColourError as error:
            problems.append(str(error))
            continue
        if found:
            return found[0], problems
    return _untagged(mode), problems


Found = tuple[Converter | None] | None
"""A converter if one is needed, or None if the file has no such declaration."""


def _by_cicp(mode: str, is_deep: bool, tags: ColourTags) -> Found:
    if tags.cicp is None:
        return None
    primaries, transfer, matrix, full_range = tags.cicp
    if transfer in (16, 18):
        raise ColourError(
            "it has a high dynamic range (PQ or HLG), which is not mapped to a screen's; convert it to a "
            "standard range before"
        )
    if primaries not in PRIMARIES or transfer not in CURVES or matrix or not full_range:
        raise ColourError(f"its coding-independent code points {tags.cicp} are not supported")
    if (primaries, transfer) == (1, 13):
        return (None,)
    curve = CURVES[transfer](LEVELS)
    return (_converter(rgb_space.from_chromaticities(PRIMARIES[primaries], curve), mode, is_deep),)


def _by_icc(mode: str, is_deep: bool, tags: ColourTags) -> Found:
    if tags.icc is None:
        return None
    if not tags.icc:
        raise ColourError("its ICC profile is damaged")
    if len(tags.icc) > MAX_PROFILE_BYTES:
        raise ColourError(
            f"its ICC profile has {len(tags.icc)} bytes, more than the limit of {MAX_PROFILE_BYTES}"
        )
    return (_profile_converter(tags.icc, mode, is_deep),)


def _as_srgb(mode: str, is_deep: bool, tags: ColourTags) -> Found:
    return (_untagged(mode),) if tags.is_srgb else None


def _by_gamma(mode: str, is_deep: bool, tags: ColourTags) -> Found:
    if tags.gamma is None and tags.chromaticities is None:
        return None
    xy = tuple(zip(*[iter(tags.chromaticities)] * 2, strict=True)) if tags.chromaticities else SRGB_PRIMARIES
    gamma = 0.45455 if tags.gamma is None else tags.gamma
    is_standard = np.allclose(xy, SRGB_PRIMARIES, atol=1e-3)
    if is_standard and abs(gamma - 0.45455) < 1e-3:
        return (None,)  # how files said sRGB before there was a chunk for it
    if not 0.01 < gamma < 10:
        raise ColourError(f"its gamma of {gamma} is not in (0.01, 10)")
    curve = LEVELS ** (1 / gamma) if tags.gamma else CURVES[13](LEVELS)
    try:
        space = rgb_space.from_chromaticities(xy, curve)
    except ValueError as error:
        raise ColourError(f"its chromaticities are impossible ({error})") from error
    return (_converter(space, mode, is_deep),)


def _converter(space: RgbSpace, mode: str, is_deep: bool) -> Converter:
    if mode == "L":
        return _by_table(rgb_space.grey_levels(space.curves[1]), is_deep)
    return space.convert


def _by_table(levels: np.ndarray, is_deep: bool) -> Converter:
    """Of grey pictures, by the uint16 level of each 16-bit level."""
    table = levels if is_deep else np.rint(levels[::257] / 257).astype(np.uint8)
    return lambda pixels: table[pixels]


@lru_cache(maxsize=16)  # profiles repeat, and tables for a printing press take tens of milliseconds
def _profile_converter(icc: bytes, mode: str, is_deep: bool) -> Converter | None:
    """None if the profile is sRGB's own, so that rounding changes nothing."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        if space not in _SPACES[mode]:
            raise ColourError(f"its ICC profile is for {space}, its pixels are {mode}")
        if mode == "L":
            return _grey_by_profile(icc, profile, space, is_deep)
        by_littlecms = _littlecms(profile, mode)
        simple = rgb_space.from_profile(icc) if is_deep else None
    except ColourError:
        raise
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ColourError(f"its ICC profile is damaged ({error})") from error
    if mode == "RGB" and _changes_little(by_littlecms):
        return None
    if not is_deep:
        return by_littlecms
    return simple.convert if isinstance(simple, RgbSpace) else partial(_interpolated, by_littlecms)


def _littlecms(profile: ImageCms.ImageCmsProfile, mode: str) -> Converter:
    """A converter of 8-bit pixels; several threads may share it."""
    transform = ImageCms.buildTransform(
        profile,
        _srgb_profile(),
        mode,
        "RGB",
        ImageCms.Intent.PERCEPTUAL,
        ImageCms.Flags.NOCACHE,  # the cache is not safe among threads
    )

    def convert(pixels: np.ndarray) -> np.ndarray:
        return np.array(transform.apply(_image(pixels, mode)))

    return convert


def _image(pixels: np.ndarray, mode: str) -> Image.Image:
    data = np.ascontiguousarray(pixels)
    return Image.frombuffer(mode, (data.shape[1], data.shape[0]), data, "raw", mode, 0, 1)


def _grey_by_profile(
    icc: bytes, profile: ImageCms.ImageCmsProfile, space: str, is_deep: bool
) -> Converter | None:
    simple = rgb_space.from_profile(icc)
    if isinstance(simple, RgbSpace):
        simple = simple.curves[1]
    if simple is not None:
        levels = rgb_space.grey_levels(simple)
    else:
        mode = "L" if space == "GRAY" else "RGB"
        greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(1 if mode == "L" else 3, axis=2)
        green = _littlecms(profile, mode)(greys)[0, :, 1]
        levels = np.rint(np.interp(LEVELS, np.arange(256) / 255, green * 257.0)).astype(np.uint16)
    if np.abs(levels[::257] / 257 - np.arange(256)).max() < 1:
        return None
    return _by_table(levels, is_deep)


def _changes_little(convert: Converter) -> bool:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    return bool(np.abs(convert(colours).astype(int) - colours).max() <= 1)


def _interpolated(convert: Converter, pixels: np.ndarray) -> np.ndarray:
    """uint16 pixels, by linear interpolation between the 8-bit colours around each."""
    made = np.empty_like(pixels)
    num_rows = max(1, _PIXELS_AT_A_TIME // pixels.shape[1])
    for top in range(0, len(pixels), num_rows):
        rows = pixels[top : top + num_rows]
        low = np.minimum(rows // 257, 254)
        share = (rows - 257 * low) / np.float32(257)
        colours = np.zeros(rows.shape, np.float32)
        for corner in product((0, 1), repeat=3):
            weight = np.where(corner, share, 1 - share).prod(axis=-1, keepdims=True)
            colours += weight * convert((low + corner).astype(np.uint8))
        made[top : top + num_rows] = np.rint(colours * 257)
    return made


def _untagged(mode: str) -> Converter | None:
    """For pixels of no declared colour space."""
    if mode == "LAB":
        return _littlecms(_lab_profile(), "LAB")
    if mode == "CMYK":
        return lambda pixels: np.array(_image(pixels, "CMYK").convert("RGB"))
    return None


@lru_cache(maxsize=1)
def _srgb_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=1)
def _lab_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
