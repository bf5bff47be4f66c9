"""Pictures broken in every way seen in buckets, each with the reasons that may be given for it."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import numpy as np
import skimage.data
from PIL import Image

SIZE = (96, 64)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
UNREADABLE, CUT = {"unreadable"}, {"unreadable", "truncated"}

Corpus = dict[str, tuple[bytes, set[str]]]
"""By key: the file, and the reasons of which one must be given; empty for a good picture."""


def good(num: int, seed: int) -> Corpus:
    """Different crops of photographs, in every format, mode and depth that training accepts."""
    made = islice(zip(_crops(seed), cycle(_GOOD.items())), num)
    return {f"good/{i:03d}-{name}": (make(crop), set()) for i, (crop, (name, make)) in enumerate(made)}


def bad(num: int, seed: int) -> Corpus:
    """Files that training must never see."""
    draw = np.random.default_rng(seed)
    made = islice(zip(_crops(seed), cycle(_BAD.items())), num)
    found = {}
    for i, (crop, (name, make)) in enumerate(made):
        file, reasons = make(crop, draw)
        found[f"bad/{i:03d}-{name}"] = (file, reasons)
    return found


def _crops(seed: int) -> Iterator[Image.Image]:
    draw = np.random.default_rng(seed)
    photos = [getattr(skimage.data, name)() for name in PHOTOS]
    for photo in cycle(photos):
        top, left = (
            int(draw.integers(side - most)) for side, most in zip(photo.shape, SIZE[::-1], strict=False)
        )
        yield Image.fromarray(photo[top : top + SIZE[1], left : left + SIZE[0]])


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _deep(crop: Image.Image) -> bytes:
    return _file(Image.fromarray(np.asarray(crop.convert("L")).astype(np.uint16) * 257), "PNG")


def _animated(crop: Image.Image) -> bytes:
    return _file(crop, "GIF", save_all=True, append_images=[crop.rotate(90)])


_GOOD: dict[str, Callable[[Image.Image], bytes]] = {
    "photo.jpg": lambda crop: _file(crop, "JPEG", quality=90),
    "photo.png": lambda crop: _file(crop, "PNG"),
    "photo.webp": lambda crop: _file(crop, "WEBP"),
    "photo.tif": lambda crop: _file(crop, "TIFF"),
    "photo.bmp": lambda crop: _file(crop, "BMP"),
    "cmyk.jpg": lambda crop: _file(crop.convert("CMYK"), "JPEG"),
    "palette.png": lambda crop: _file(crop.quantize(64), "PNG"),
    "grey.jpg": lambda crop: _file(crop.convert("L"), "JPEG"),
    "sixteen.png": _deep,
    "clear.png": lambda crop: _file(crop.convert("RGBA"), "PNG"),
    "really-a-png.jpg": lambda crop: _file(crop, "PNG"),
    "really-animated.png": _animated,
}

Broken = tuple[bytes, set[str]]


def _truncated(kind: str, share: float) -> Callable[[Image.Image, np.random.Generator], Broken]:
    def make(crop: Image.Image, draw: np.random.Generator) -> Broken:
        file = _file(crop, kind)
        return file[: max(1, int(len(file) * share * draw.uniform(0.8, 1)))], CUT

    return make


def _flipped_png(crop: Image.Image, draw: np.random.Generator) -> Broken:
    file = bytearray(_file(crop, "PNG"))
    start = file.index(b"IDAT") + 4
    file[int(draw.integers(start, len(file) - 20))] ^= 1 << int(draw.integers(8))
    return bytes(file), CUT


def _flipped_jpeg_header(crop: Image.Image, draw: np.random.Generator) -> Broken:
    file = bytearray(_file(crop, "JPEG"))
    file[int(draw.integers(2))] ^= 1 << int(draw.integers(8))  # no start-of-image marker any more
    return bytes(file), UNREADABLE


def _png_of_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def _bomb(crop: Image.Image, draw: np.random.Generator) -> Broken:
    return _png_of_size(int(draw.integers(12_000, 60_000)), int(draw.integers(12_000, 60_000))), {"bomb"}


def _tiff_bomb(crop: Image.Image, draw: np.random.Generator) -> Broken:
    file = bytearray(_file(crop, "TIFF"))
    for tag in (256, 257):  # width and length, as 32-bit numbers
        place = file.index(struct.pack("<HHI", tag, 4, 1)) + 8
        file[place : place + 4] = struct.pack("<I", 50_000 + int(draw.integers(1000)))
    return bytes(file), {"bomb"}


def _html(crop: Image.Image, draw: np.random.Generator) -> Broken:
    page = f"<html><head><title>404 Not Found</title></head><body>{draw.integers(10**9)}</body></html>"
    return page.encode(), UNREADABLE


def _small(kind: str, mode: str) -> Callable[[Image.Image, np.random.Generator], Broken]:
    def make(crop: Image.Image, draw: np.random.Generator) -> Broken:
        size = (int(draw.integers(1, 31)), int(draw.integers(1, 64)))
        noise = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), np.uint8))
        return _file(noise.convert(mode), kind), {"too-small"}

    return make


def _float(crop: Image.Image, draw: np.random.Generator) -> Broken:
    return _file(Image.fromarray(np.asarray(crop.convert("L"), np.float32) / 255), "TIFF"), {"mode"}


def _cut_animation(crop: Image.Image, draw: np.random.Generator) -> Broken:
    file = _animated(crop)
    return file[: int(len(file) * draw.uniform(0.02, 0.4))], CUT  # within the first frame


def _cut_mode(mode: str) -> Callable[[Image.Image, np.random.Generator], Broken]:
    def make(crop: Image.Image, draw: np.random.Generator) -> Broken:
        file = _file(crop.convert(mode), "PNG" if mode == "P" else "JPEG")
        return file[: len(file) // 2], CUT

    return make


def _cut_deep(crop: Image.Image, draw: np.random.Generator) -> Broken:
    file = _deep(crop)
    return file[: int(len(file) * draw.uniform(0.05, 0.9))], CUT


_BAD: dict[str, Callable[[Image.Image, np.random.Generator], Broken]] = {
    **{
        f"cut-{share:.0%}.{kind.lower()}".replace("%", ""): _truncated(kind, share)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
        for share in (0.02, 0.3, 0.6, 0.9)
    },
    "flipped.png": _flipped_png,
    "flipped.jpg": _flipped_jpeg_header,
    "empty.png": lambda crop, draw: (b"", UNREADABLE),
    "text.png": lambda crop, draw: (f"no picture {draw.integers(10**9)}".encode(), UNREADABLE),
    "noise.webp": lambda crop, draw: (draw.bytes(500), UNREADABLE),
    "error.jpg": _html,
    "bomb.png": _bomb,
    "bomb.tif": _tiff_bomb,
    "small.png": _small("PNG", "RGB"),
    "small-cmyk.jpg": _small("JPEG", "CMYK"),
    "small-palette.png": _small("PNG", "P"),
    "float.tif": _float,
    "cut-animation.png": _cut_animation,
    "cut-cmyk.jpg": _cut_mode("CMYK"),
    "cut-palette.png": _cut_mode("P"),
    "cut-sixteen.png": _cut_deep,
}
