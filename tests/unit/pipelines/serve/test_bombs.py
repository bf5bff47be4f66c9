"""Files of few bytes that would cost a decoder minutes are refused at once, and ordinary ones are not."""

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ctmsr.image import encode_png, read
from pipelines.serve.bombs import check_parts
from pipelines.serve.limits import Refusal
from tests.support.serving import encoded

PICTURE = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
MILLION = zlib.compress(b"\xff" * 1_000_000, 9)  # which is no UTF-8, so Pillow does not count it


def png(*chunks: bytes, end: bool = False) -> bytes:
    """A picture with chunks after its header, or before its end."""
    data = encode_png(PICTURE)
    place = len(data) - 12 if end else 33
    return data[:place] + b"".join(chunks) + data[place:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_scans(number: int) -> bytes:
    """A progressive JPEG in which one scan is repeated."""
    flat = encoded(Image.new("RGB", (64, 64), (10, 200, 30)), "JPEG", progressive=True)
    start = flat.rindex(b"\xff\xda")
    return flat[:start] + flat[start:-2] * number + flat[-2:]


def with_comments(number: int) -> bytes:
    gif = encoded(Image.fromarray(PICTURE), "GIF")
    place = gif.index(b"\x2c")
    return gif[:place] + b"\x21\xfe\x01a\x00" * number + gif[place:]


BOMBS = {
    "comments of GIF": with_comments(1_000_000),
    "comments of PPM": b"P6\n" + b"#a\n" * 10_000_000 + b"5 5\n255\n" + bytes(75),
    "later comments of PPM": b"P6 5" + b"\n#a\n" * 10_000_000 + b"5\n255\n" + bytes(75),
    "blanks of PPM": b"P6\n" + b" " * 30_000_000 + b"5 5\n255\n" + bytes(75),
    "zTXt": png(*[chunk(b"zTXt", b"k\0\0" + MILLION)] * 1000),
    "iTXt": png(*[chunk(b"iTXt", b"k\0\1\0\0\0" + MILLION)] * 1000),
    "iCCP": png(*[chunk(b"iCCP", b"k\0\0" + MILLION)] * 1000),
    "texts at the end": png(*[chunk(b"zTXt", b"k\0\0" + MILLION)] * 1000, end=True),
    "chunks": png(*[chunk(b"abCd", b"")] * 1_000_000),
    "scans": with_scans(2000),
    "segments": b"\xff\xd8" + b"\xff\xe1\x00\x02" * 1_000_000 + with_scans(1)[2:],
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timed
def test_a_bomb_is_refused_at_once(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(Refusal, match=r"has more than \d+ .* Save it again without metadata") as raised:
        check_parts(BOMBS[name])
    assert time.monotonic() - started < 0.5
    assert raised.value.status == 413


def test_the_repeated_scans_are_valid() -> None:
    assert read(with_scans(20), name="it").pixels.shape == (64, 64, 3)


def texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for number in range(20):
        info.add_text(f"key {number}", "a long text " * 100, zip=True)
    return info


@pytest.mark.parametrize(
    "data",
    [
        png(),
        encoded(Image.fromarray(PICTURE), "PNG", pnginfo=texts()),
        encoded(Image.fromarray(PICTURE), "JPEG"),
        encoded(Image.fromarray(PICTURE), "JPEG", progressive=True, comment=b"x" * 60_000),
        encoded(Image.fromarray(PICTURE), "WEBP"),
        encoded(Image.fromarray(PICTURE), "PPM"),
        b"P2\n# by hand\n20 100\n255\n" + b"0 " * 2000,
        with_comments(20),
        b"\xff\xd8",
        b"\xff\xd8\xff\xe1\x00\x00",
        b"\x89PNG\r\n\x1a\n\xff",
        b"",
    ],
)
def test_other_files_pass(data: bytes) -> None:
    check_parts(data)
