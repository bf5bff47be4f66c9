"""Reads picture files: pixels in sRGB and upright, with alpha, depth and metadata."""

import io
import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFile, features

from ..errors import PictureError
from .colour import ColourTags, find_converter
from .metadata import Metadata, read_metadata
from .pixels import file_pixels

logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485
"""Largest picture decoded: Pillow's own threshold for a suspected decompression bomb (256 MiB of RGB)."""

# Named so that Pillow never hands an upload to an interpreter (EPS, PDF) or an exotic parser.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", *(["AVIF"] if features.check("avif") else []))
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"}
_AVIF_BRANDS = {b"avif", b"avis"}
_UNSPECIFIED = 2  # of ITU-T H.273


@dataclass(frozen=True)
class Picture:
    """A decoded picture: upright, in sRGB."""

    pixels: np.ndarray
    """uint8 or uint16, (height, width, channels), writable: grey, grey and alpha, RGB, or RGB and alpha.
    Alpha is straight: colours are not multiplied by it."""
    format: str
    """By the file's header, not its name."""
    metadata: Metadata = field(default_factory=Metadata)
    warnings: tuple[str, ...] = ()
    """What of the file is not in the picture, one sentence each, with the picture's name."""

    @property
    def is_grey(self) -> bool:
        return self.pixels.shape[2] < 3

    @property
    def is_deep(self) -> bool:
        """Whether it has 16 bits a channel."""
        return self.pixels.dtype == np.uint16

    @property
    def alpha(self) -> np.ndarray | None:
        """(height, width), from 0, transparent, to the highest level; None if the picture is opaque."""
        return None if self.pixels.shape[2] % 2 else self.pixels[..., -1]

    @property
    def rgb(self) -> np.ndarray:
        """(height, width, 3), without alpha."""
        return self.pixels[..., :1].repeat(3, axis=2) if self.is_grey else self.pixels[..., :3]


def decode(data: bytes, *, name: str) -> np.ndarray:
    """Decodes a picture to 8-bit sRGB, as viewers show it on a white page.

    16 bits are rounded to 8 after colours are converted. Transparency is composited over white rather than
    dropped, as the colour of transparent pixels is a remnant of editing that nobody is meant to see. What of
    the file is not shown, such as further frames, is logged as a warning.

    Args:
        data: A whole file, as for `read`.
        name: Key, path or URI of the picture, for messages.

    Returns:
        uint8 of shape (height, width, 3), writable.

    Raises:
        PictureError: As `read` does.
    """
    picture = read(data, name=name)
    for warning in picture.warnings:
        _warn_once(warning)
    return over_white(picture)


def over_white(picture: Picture) -> np.ndarray:
    """uint8 (height, width, 3): the picture on a white page."""
    if picture.alpha is None:
        rgb = picture.rgb
        return np.rint(rgb / np.float32(257)).astype(np.uint8) if picture.is_deep else rgb
    if not picture.is_deep:  # Pillow needs a quarter of the memory
        rgba = Image.fromarray(picture.pixels).convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    alpha = picture.alpha[..., None] / np.float32(65535)
    made: np.ndarray = np.rint(picture.rgb * (alpha / np.float32(257)) + 255 * (1 - alpha)).astype(np.uint8)
    return made


def read(data: bytes, *, name: str) -> Picture:
    """Reads a picture file: all of it that is a still picture.

    The orientation of EXIF or XMP is applied. Colours are converted to sRGB from the ICC profile or, without
    one, from PNG's colour chunks; a declaration that cannot be followed is ignored with a warning. Animations
    and further pages yield the first, with a warning.

    Args:
        data: A whole file of one of `FORMATS`, or HEIC where pillow-heif is installed.
        name: Key, path or URI of the picture, for messages.

    Raises:
        PictureError: The bytes are empty, damaged or in another format ("unreadable"); they end too early
            ("truncated"); there are more than `MAX_PIXELS` pixels, or texts that unpack to megabytes
            ("bomb"); or the pixels have no fixed white level, like 32-bit integers and floats ("mode").
            It is HEIC, or AVIF, and a plug-in is missing ("plug-in"). Damage that leaves a valid stream, such
            as flipped bits in a JPEG's coefficients, goes undetected.
    """
    with _picture_errors(data, name):
        return _read(data, name)


def header_size(data: bytes, *, name: str) -> tuple[int, int]:
    """Width and height as the header of a file has them; no pixel is decoded.

    Raises:
        PictureError: The header is damaged or of no known format ("unreadable"), or has more than twice
            `MAX_PIXELS` pixels ("bomb").
    """
    with _picture_errors(data, name), _open(data, name) as image:
        return image.size


@contextmanager
def _picture_errors(data: bytes, name: str) -> Iterator[None]:
    try:
        yield
    except PictureError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
        raise PictureError(
            f"{name} is not a readable picture ({len(data)} bytes; {type(error).__name__}: {_said(error)}). "
            f"It must be a complete file of one of {', '.join(FORMATS)}. Replace it or leave it out.",
            _reason(error),
        ) from error


def _read(data: bytes, name: str) -> Picture:
    with _open(data, name) as image:
        if image.width * image.height > MAX_PIXELS:
            raise PictureError(
                f"{name} has {image.width}x{image.height} pixels, above the limit of {MAX_PIXELS}. "
                "Downscale it, split it, or leave it out.",
                "bomb",
            )
        problems = _unseen(image)
        pixels, mode = file_pixels(image, lambda: _open(data, name), name)
        tags = _colour_tags(image, data)
        metadata, left_out = read_metadata(image)
    convert, ignored = find_converter(mode, pixels.dtype == np.uint16, tags)
    if convert:
        num_colours = 1 if mode == "L" else len(mode)
        colours, alpha = np.split(pixels, [num_colours], axis=-1)
        pixels = np.concatenate([convert(colours), alpha], axis=-1)
    problems += [f"{problem}; its colours may be wrong" for problem in ignored] + left_out
    warnings = tuple(f"{name}: {problem}." for problem in problems)
    return Picture(pixels, str(image.format), metadata, warnings)


def _open(data: bytes, name: str) -> ImageFile.ImageFile:
    """Reads a file's header.

    Raises:
        PictureError: The format needs a plug-in that is not installed.
        Exception: Whatever Pillow raises.
    """
    formats: tuple[str, ...] = FORMATS
    brands = _brands(data)
    if brands & _AVIF_BRANDS and "AVIF" not in FORMATS:
        raise PictureError(
            f"{name} is AVIF, which this build of Pillow cannot read. Install one with AVIF, or convert it.",
            "plug-in",
        )
    if brands & _HEIC_BRANDS:
        if not _has_heif():
            raise PictureError(
                f"{name} is HEIC, which needs a plug-in: run `pip install pillow-heif`, or convert it.",
                "plug-in",
            )
        formats = ("HEIF",)
    return Image.open(io.BytesIO(data), formats=formats)


def _brands(data: bytes) -> set[bytes]:
    """Of a file of the family of MP4, to which HEIC and AVIF belong."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return {box[place : place + 4] for place in range(0, len(box), 4)}


@lru_cache(maxsize=1)
def _has_heif() -> bool:
    """Whether pillow-heif is installed; if so, registers it with Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _unseen(image: ImageFile.ImageFile) -> list[str]:
    """What further pictures the file has. Those of a phone's MPO are parts of the first, like its depth."""
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return []
    if image.format == "TIFF":
        return ["it has several pages; only the first is read"]
    return ["it is animated; only the first frame is read"]


def _colour_tags(image: ImageFile.ImageFile, data: bytes) -> ColourTags:
    icc = image.info.get("icc_profile", ())
    is_png = image.format == "PNG"
    return ColourTags(
        cicp=_png_cicp(data) if is_png else None if icc else _mp4_cicp(data),
        icc=None if icc == () else icc or b"",
        is_srgb=is_png and "srgb" in image.info,
        gamma=image.info.get("gamma") if is_png else None,
        chromaticities=image.info.get("chromaticity") if is_png else None,
    )


def _png_cicp(data: bytes) -> tuple[int, int, int, int] | None:
    """Pillow does not read this chunk of PNG's third edition."""
    place = 8
    while place + 12 <= len(data) and (kind := data[place + 4 : place + 8]) != b"IDAT":
        (size,) = struct.unpack_from(">I", data, place)
        if kind == b"cICP" and size == 4:
            primaries, transfer, matrix, full_range = data[place + 8 : place + 12]
            return primaries, transfer, matrix, full_range
        place += 12 + size
    return None


def _mp4_cicp(data: bytes) -> tuple[int, int, int, int] | None:
    """The same numbers in AVIF and HEIC; the decoder has seen to matrix and range."""
    place = data.find(b"colrnclx", 0, 1 << 16) if _brands(data) else -1
    if place < 0 or len(data) < place + 12:
        return None
    primaries, transfer = struct.unpack_from(">HH", data, place + 8)
    return None if _UNSPECIFIED in (primaries, transfer) else (primaries, transfer, 0, 1)


def _said(error: Exception) -> str:
    """An error's text, without the address of the object in memory."""
    return re.sub(r" ?<_io\.BytesIO object at \w+>", "", str(error))


def _reason(error: Exception) -> str:
    """The kind of defect that an error of Pillow's stands for."""
    said = str(error).lower()
    if isinstance(error, Image.DecompressionBombError) or "data too large" in said or "text memory" in said:
        return "bomb"
    return (
        "truncated"
        if any(word in said for word in ("truncated", "too short", "not enough"))
        else "unreadable"
    )


@lru_cache(maxsize=4096)
def _warn_once(warning: str) -> None:
    logger.warning("%s", warning)
