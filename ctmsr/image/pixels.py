"""The pixels of an opened picture file as an array: upright, in the file's own colours and depth.

Pillow keeps 16 bits of grey pictures only; of colours it keeps the high bytes. It unpacks the low bytes of
the same file when told that they come in the other order. So two readings make 16 bits, for every layout of
PNG and TIFF that Pillow knows, and without another decoder.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile

from ..errors import PictureError
from .metadata import drop_long_exif

_DEEP = re.compile(r"(RGB|RGBA|RGBX|RGBa|[RGBA]);16[BLN]")
_DEEP_GREY_ALPHA = "LA;16B"
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_COLOURS = ("L", "RGB", "CMYK", "LAB")
_STRIP_PX = 2**15
"""Pixels copied at a time: few enough to stay in a core's cache."""
_BITS_PER_SAMPLE, _PLANES, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 284, 262, 0  # of TIFF


def file_pixels(image: ImageFile, reopen: Callable[[], ImageFile], name: str) -> tuple[np.ndarray, str]:
    """Loads a picture.

    Args:
        image: Opened, but not loaded.
        reopen: Opens it once more.
        name: Of the picture, for the error message.

    Returns:
        uint8 or uint16 (height, width, channels), alpha last if there is any; and the Pillow mode of the
        colours: L, RGB, CMYK or LAB.

    Raises:
        PictureError: Pixels have no fixed white level ("mode").
    """
    rawmodes = _rawmodes(image)
    if rawmodes == {_DEEP_GREY_ALPHA}:
        _unpack(image, lambda rawmode: "RGBA")  # a pixel's four bytes
        return np.array(_upright(image)).view(">u2").astype(np.uint16), "L"
    if rawmodes and all(map(_DEEP.fullmatch, rawmodes)):
        with reopen() as other:
            return _deep_colours(image, other), "RGB"
    upright = _upright(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PPM"):
        return _deep_greys(image, upright, rawmodes), "L"
    if upright.mode in ("I", "F"):
        raise PictureError(
            f"{name} has pixels of Pillow mode {upright.mode!r}, which have no fixed white level. "
            "Convert it to 8 or 16 bits a channel, or leave it out.",
            "mode",
        )
    upright = _plain(upright)
    return _bytes_of(upright), upright.mode.removesuffix("A")


def _upright(image: ImageFile) -> Image.Image:
    image.load()
    drop_long_exif(image)
    if image.getexif().get(Base.Orientation, 1) not in range(2, 9):
        return image  # of which `exif_transpose` would make a copy
    return ImageOps.exif_transpose(image)


def _bytes_of(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, channels), writable.

    In strips: `np.array(image)` copies the whole of a large picture three times, each time to fresh memory,
    and takes longer than decoding it did.
    """
    width, height = image.size
    pixels = np.empty((height, width, len(image.getbands())), np.uint8)
    num_rows = max(1, _STRIP_PX // width)
    for top in range(0, height, num_rows):
        bottom = min(top + num_rows, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom))).reshape(bottom - top, width, -1)
    return pixels


def _rawmodes(image: ImageFile) -> set[str]:
    """How the bytes of pixels lie in the file: one for all, or one for each plane; none if it is no help."""
    if _tag(image, _PLANES, 1) == 2 and {tile.codec_name for tile in image.tile} == {"libtiff"}:
        return set()  # of compressed planes, Pillow unpacks the high bytes only
    rawmodes = {_rawmode(tile.args) for tile in image.tile}
    if rawmodes and rawmodes <= {"R", "G", "B", "A"} and _tag(image, _BITS_PER_SAMPLE, (8,))[0] == 16:
        # Pillow takes the planes for 8 bits wide.
        order = "L" if image.tag_v2.prefix == b"II" else "B"  # type: ignore[attr-defined] # a TIFF
        _unpack(image, lambda rawmode: f"{rawmode};16{order}")
        return {f"{rawmode};16{order}" for rawmode in rawmodes}
    return rawmodes


def _rawmode(args: Any) -> str:
    return args if isinstance(args, str) else str(args[0])


def _unpack(image: ImageFile, renamed: Callable[[str], str]) -> None:
    """Has Pillow take the bytes of a file for another layout, given by a function of the present one."""
    image.tile = [
        tile._replace(
            args=renamed(tile.args)
            if isinstance(tile.args, str)
            else (renamed(_rawmode(tile.args)), *(tile.args or ())[1:])
        )
        for tile in image.tile
    ]


def _tag(image: ImageFile, tag: int, default: Any) -> Any:
    """Of a TIFF; the default for other formats."""
    return getattr(image, "tag_v2", {}).get(tag, default)


def _deep_colours(image: ImageFile, other: ImageFile) -> np.ndarray:
    """uint16 (height, width, 3 or 4), from two openings of a file."""
    premultiplied = any(rawmode.startswith("RGBa") for rawmode in _rawmodes(image) | _rawmodes(other))
    for file in (image, other):  # Pillow would divide the bytes by alpha one by one
        _unpack(file, lambda rawmode: rawmode.replace("a", "A"))
    _unpack(other, lambda rawmode: rawmode[:-1] + _OTHER_ORDER[rawmode[-1]])
    high, low = (np.array(_upright(file), np.uint16) for file in (image, other))
    pixels = 256 * high + low
    if premultiplied:
        alpha = np.maximum(pixels[..., 3:], 1).astype(np.float32)
        pixels[..., :3] = np.rint(pixels[..., :3] * (65535 / alpha)).clip(0, 65535).astype(np.uint16)
    return _with_transparent_colour(image, pixels)


def _deep_greys(image: ImageFile, upright: Image.Image, rawmodes: set[str]) -> np.ndarray:
    """uint16 (height, width, 1 or 2)."""
    pixels: np.ndarray = np.array(upright, np.uint16)[..., None]
    if rawmodes == {"I;12"}:
        pixels = pixels << 4 | pixels >> 8
    if _tag(image, _PHOTOMETRIC, None) == _WHITE_IS_ZERO:
        pixels = 65535 - pixels
    return _with_transparent_colour(image, pixels)


def _with_transparent_colour(image: ImageFile, pixels: np.ndarray) -> np.ndarray:
    """With alpha, if a PNG declares one colour transparent."""
    colour = image.info.get("transparency")
    if colour is None:
        return pixels
    alpha = np.where((pixels == colour).all(axis=-1, keepdims=True), 0, 65535)
    return np.concatenate([pixels, alpha.astype(np.uint16)], axis=-1)


def _plain(image: Image.Image) -> Image.Image:
    """In one of `_COLOURS`, or L or RGB with alpha; palettes are looked up."""
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        return image.convert("LA" if is_grey else "RGBA")
    if is_grey:
        return image.convert("L")
    return image if image.mode in _COLOURS else image.convert("RGB")
