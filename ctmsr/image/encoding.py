"""Writes picture files: pixels in sRGB, which the file says, and metadata."""

import io
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ..errors import ConfigError, PictureError
from .decoding import Picture, over_white
from .metadata import Metadata

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""By format."""
NOTE = "ctmsr-ray"
"""Keyword of a note in a file."""

_LONGEST_SIDE = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
_COMPRESS_LEVEL = 1
"""Of zlib. Pillow's default, 6, takes three times as long on a photograph and saves a tenth."""
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Of PNG, by number of channels."""
_UP = 2
"""PNG's filter that stores the difference from the row above."""


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How pictures are written."""

    kind: str = "png"
    """One of `SUFFIXES`. Only PNG has 16 bits and loses nothing; JPEG has no transparency."""
    quality: int = 95
    """From 1 to 100; of JPEG and WebP."""
    keeps_metadata: bool = True
    """Whether EXIF, XMP and resolution are written."""

    def __post_init__(self) -> None:
        if self.kind not in SUFFIXES:
            raise ConfigError(f"the format must be one of {', '.join(SUFFIXES)}, got {self.kind!r}.")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"the quality must be from 1 to 100, got {self.quality}.")

    def check(self, picture: Picture, scale: int, name: str) -> tuple[str, ...]:
        """What of the picture, enlarged `scale` times, a file cannot hold: for warnings.

        Raises:
            PictureError: It would be too large.
        """
        longest = scale * max(picture.pixels.shape[:2])
        if longest > (limit := _LONGEST_SIDE[self.kind]):
            raise PictureError(
                f"{name} enlarged would have a side of {longest} pixels; {self.kind} allows {limit}. "
                "Write PNG, or crop it."
            )
        if self.kind == "jpeg" and picture.alpha is not None:
            return (f"{name}: JPEG has no transparency; the picture is on white. PNG and WebP keep it.",)
        return ()


def encode_png(image_u8: np.ndarray) -> bytes:
    """Lossless PNG file of a uint8 HWC RGB array."""
    buffer = io.BytesIO()
    Image.fromarray(image_u8).save(buffer, "PNG")
    return buffer.getvalue()


def encode(picture: Picture, file_format: FileFormat = FileFormat(), note: str = "") -> bytes:
    """A picture file, tagged as sRGB. Grey JPEG is not, as its profile would be another; viewers assume it.

    Args:
        picture: What to write.
        file_format: How.
        note: A text in ASCII, which stands within `NOTE_BYTES` of an end of the file.
    """
    metadata = picture.metadata if file_format.keeps_metadata else Metadata()
    if file_format.kind == "png":
        return _png(picture.pixels, metadata, note)
    write = _jpeg if file_format.kind == "jpeg" else _webp
    return write(picture, file_format.quality, metadata, note)


def has_note(file: bytes, note: str) -> bool:
    """Whether a file, or its two ends of `NOTE_BYTES` and the note's length, has this note."""
    return _marked(note) in file


NOTE_BYTES = 512
"""Size of what comes before a note in a file, or after it, generously."""


def _marked(note: str) -> bytes:
    return f"{NOTE}\0{note}".encode()


def _png(pixels: np.ndarray, metadata: Metadata, note: str) -> bytes:
    is_deep = pixels.dtype == np.uint16
    chunks = PngInfo()
    if note:
        chunks.add_text(NOTE, note)
    chunks.add(b"sRGB", b"\0")  # perceptual
    if metadata.xmp:
        chunks.add_itxt("XML:com.adobe.xmp", metadata.xmp)
    shown = pixels[:1, :1] // 257 if is_deep else pixels  # Pillow writes no 16 bits, but all around them
    file = io.BytesIO()
    Image.fromarray(_squeezed(shown.astype(np.uint8))).save(
        file, "PNG", pnginfo=chunks, compress_level=_COMPRESS_LEVEL, **_settings(metadata)
    )
    return _with_deep_pixels(file.getvalue(), pixels) if is_deep else file.getvalue()


def _squeezed(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _settings(metadata: Metadata) -> dict[str, object]:
    """Of Pillow, without those that a file has nothing for."""
    settings = {"exif": metadata.exif_bytes(), "dpi": metadata.dpi}
    return {name: value for name, value in settings.items() if value}


def _with_deep_pixels(png: bytes, pixels: np.ndarray) -> bytes:
    """A PNG with its pixels, of 8 bits, replaced by others of 16."""
    height, width, num_channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[num_channels], 0, 0, 0)
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    new = {b"IHDR": header, b"IDAT": zlib.compress(filtered.data, _COMPRESS_LEVEL)}
    made, place = [png[:8]], 8
    while place < len(png):
        (size,) = struct.unpack_from(">I", png, place)
        kind = png[place + 4 : place + 8]
        data = new.get(kind, png[place + 8 : place + 8 + size])
        made += [struct.pack(">I4s", len(data), kind), data, struct.pack(">I", zlib.crc32(kind + data))]
        place += 12 + size
    return b"".join(made)


def _jpeg(picture: Picture, quality: int, metadata: Metadata, note: str) -> bytes:
    on_white = over_white(picture)
    pixels, icc = (on_white[..., 0], b"") if picture.is_grey else (on_white, _srgb_profile())
    settings = _settings(metadata) | {"icc_profile": icc, "xmp": metadata.xmp.encode()}
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file,
        "JPEG",
        quality=quality,
        subsampling=0,
        **{name: value for name, value in settings.items() if value},
    )
    data = file.getvalue()
    if not note:
        return data
    marked = _marked(note)  # a comment behind the first segment, whose length stands in its head
    behind = 4 + int.from_bytes(data[4:6], "big")
    return data[:behind] + b"\xff\xfe" + struct.pack(">H", len(marked) + 2) + marked + data[behind:]


def _webp(picture: Picture, quality: int, metadata: Metadata, note: str) -> bytes:
    rgb, alpha = picture.rgb, picture.alpha
    pixels = rgb if alpha is None else np.dstack([rgb, alpha])
    if picture.is_deep:
        pixels = np.rint(pixels / np.float32(257)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        file,
        "WEBP",
        quality=quality,
        icc_profile=_srgb_profile(),
        exif=metadata.exif_bytes(with_dpi=True),
        xmp=metadata.xmp.encode(),
    )
    data = file.getvalue()
    if not note:
        return data
    marked = _marked(note)  # a chunk that readers skip, behind the others
    data += b"ctms" + struct.pack("<I", len(marked)) + marked + b"\0" * (len(marked) % 2)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


@lru_cache(maxsize=1)
def _srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
