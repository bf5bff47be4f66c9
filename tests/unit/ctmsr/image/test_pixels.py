"""Pixels of every layout come out exactly: all 16 bits of them, upright, and alpha as it is."""

import base64
import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ctmsr.errors import PictureError
from ctmsr.image import decode, read
from tests.support.picture_files import png

DEEP = np.random.default_rng(0).integers(0, 65536, (13, 18, 4), dtype=np.uint16)


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_png_of_16_bits(num_channels: int) -> None:
    pixels = DEEP[..., :num_channels]
    picture = read(png(pixels), name="x")
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.pixels.dtype == np.uint16
    assert picture.is_grey == (num_channels < 3)
    assert (picture.alpha is None) == (num_channels % 2 == 1)


def test_png_of_16_bits_by_another_writer() -> None:
    done, file = cv2.imencode(".png", DEEP[..., 2::-1])
    assert done
    np.testing.assert_array_equal(read(file.tobytes(), name="x").pixels, DEEP[..., :3])


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("num_channels", "options"),
    [
        (1, {"photometric": "minisblack"}),
        (3, {"photometric": "rgb"}),
        (3, {"photometric": "rgb", "tile": (16, 16)}),
        (4, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (3, {"photometric": "rgb", "planarconfig": "separate"}),
    ],
    ids=["grey", "rgb", "tiles", "rgba", "planes"],
)
def test_tiff_of_16_bits(
    num_channels: int, options: dict[str, object], compression: str | None, byteorder: str
) -> None:
    pixels = DEEP[..., :num_channels]
    stored = pixels[..., 0] if num_channels == 1 else pixels
    if options.get("planarconfig"):
        stored = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    data = tiff(stored, compression=compression, byteorder=byteorder, metadata=None, **options)
    made = read(data, name="x").pixels
    if (options.get("planarconfig"), compression) == ("separate", "zlib"):
        pixels = pixels // 256  # all that Pillow gives
    np.testing.assert_array_equal(made, pixels)


def test_tiff_whose_white_is_0() -> None:
    data = tiff(DEEP[..., 0], photometric="miniswhite", metadata=None)
    np.testing.assert_array_equal(read(data, name="x").pixels, 65535 - DEEP[..., :1])


def test_premultiplied_alpha_is_divided_out() -> None:
    alpha = np.maximum(DEEP[..., 3:], 3000)
    stored = np.rint(DEEP[..., :3] * (alpha / 65535)).astype(np.uint16)
    pixels = np.concatenate([stored, alpha], axis=2)
    picture = read(tiff(pixels, photometric="rgb", extrasamples=["assocalpha"], metadata=None), name="x")
    np.testing.assert_array_equal(picture.alpha, alpha[..., 0])
    np.testing.assert_allclose(picture.rgb.astype(float), DEEP[..., :3], atol=11)  # alpha is 1/22 or more


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "16 bits", "16 bits, TIFF"])
def test_orientations(kind: str, orientation: int) -> None:
    shown = np.zeros((16, 32, 3), np.uint8)
    shown[:8, :16], shown[8:, 16:] = (255, 0, 0), (0, 0, 255)
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turns |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # what undoes the turn to be made
    image = Image.fromarray(shown)
    stored = image.transpose(Image.Transpose[turns[orientation]]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    if kind == "16 bits":
        data = png(np.asarray(stored).astype(np.uint16) * 257, (b"eXIf", exif.tobytes()[6:]))
    elif kind == "16 bits, TIFF":
        deep = np.asarray(stored).astype(np.uint16) * 257
        data = tiff(deep, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    else:
        options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        stored.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else options))
        data = buffer.getvalue()
    picture = read(data, name="x")
    assert picture.pixels.shape == shown.shape
    assert np.abs(decode(data, name="x").astype(int) - shown).max() <= 4
    assert picture.metadata.exif.get(0x0112, 1) == 1


@pytest.mark.parametrize("element", [True, False])
def test_the_orientation_of_xmp(element: bool) -> None:
    value = "<tiff:Orientation>6</tiff:Orientation>" if element else ""
    attribute = "" if element else ' tiff:Orientation="6"'
    xmp = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{attribute}>{value}</rdf:Description>'
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16)).save(buffer, "JPEG", xmp=xmp.encode())
    picture = read(buffer.getvalue(), name="x")
    assert picture.pixels.shape == (32, 16, 3)
    assert "6" not in picture.metadata.xmp


def test_one_transparent_colour() -> None:
    grey = DEEP[..., :1]
    data = png(grey, (b"tRNS", struct.pack(">H", grey[2, 3, 0])))
    np.testing.assert_array_equal(read(data, name="x").alpha == 0, (grey == grey[2, 3, 0])[..., 0])
    colour = DEEP[4, 5, :3]
    picture = read(png(DEEP[..., :3], (b"tRNS", struct.pack(">3H", *colour))), name="x")
    np.testing.assert_array_equal(picture.pixels[..., :3], DEEP[..., :3])
    assert picture.alpha is not None
    assert np.argwhere(picture.alpha == 0).tolist() == [[4, 5]]
    eight = (DEEP[..., :3] >> 8).astype(np.uint8)
    assert read(png(eight, (b"tRNS", struct.pack(">3H", *eight[4, 5]))), name="x").pixels[4, 5, 3] == 0
    assert read(png(eight[..., :1], (b"tRNS", b"\0\x07")), name="x").pixels.shape == (13, 18, 2)


def test_kinds_of_8_bits() -> None:
    rgba = (DEEP >> 8).astype(np.uint8)
    for num_channels in (1, 2, 3, 4):
        pixels = rgba[..., :num_channels]
        np.testing.assert_array_equal(read(png(pixels), name="x").pixels, pixels)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 150, 100])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        buffer = io.BytesIO()
        palette.save(buffer, kind, transparency=0)
        pixels = read(buffer.getvalue(), name="x").pixels
        assert pixels[0, 1].tolist() == [200, 150, 100, 255]
        assert pixels[0, 0, 3] == 0


def test_a_pgm_of_16_bits() -> None:
    data = b"P5 18 13 65535\n" + DEEP[..., 0].astype(">u2").tobytes()
    np.testing.assert_array_equal(read(data, name="x").pixels, DEEP[..., :1])


def frames(kind: str) -> bytes:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "warning"),
    [
        ("GIF", "it is animated; only the first frame is read"),
        ("PNG", "it is animated; only the first frame is read"),
        ("WEBP", "it is animated; only the first frame is read"),
        ("TIFF", "it has several pages; only the first is read"),
        ("MPO", ""),
    ],
)
def test_the_first_of_several_pictures(kind: str, warning: str) -> None:
    picture = read(frames(kind), name="dance")
    assert picture.warnings == ((f"dance: {warning}.",) if warning else ())
    assert np.abs(picture.rgb.astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("option", [{"progressive": True}, {"optimize": True}, {"keep_rgb": True}, {}])
def test_kinds_of_jpeg(option: dict[str, bool]) -> None:
    smooth = np.linspace(0, 255, 64).astype(np.uint8)[:, None, None].repeat(48, axis=1).repeat(3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95, **option)
    video = b"\0\0\0\x18ftypmp42" + bytes(1000)  # a motion photo's, behind the picture
    for tail in (b"", video):
        assert np.abs(decode(buffer.getvalue() + tail, name="x").astype(int) - smooth).max() <= 4


# By libjpeg-turbo: the left half is (200, 100, 50), the right half (20, 120, 220).
ARITHMETIC_JPEG = (
    "c-obW%?ZLl5QX3D>|ZuH>^2}+h<FeJYD&?w?W6=xf(3{Kym>L^VkNFST7lo=J!Tl*<VSuXZrXJVB7lmJC#;}IkW_+ZNuxDuYpng+Rle9+>"
    "uX;Hp-fF38d>DYuc{2Q3C_CkH+ewvh=@!HDiJ5jHw46JC?=DiXqd`@6P9>)huw7Dp2o$w8)oz4rQhHCJbnPWQz0_"
)


def test_an_arithmetic_jpeg() -> None:
    pixels = decode(zlib.decompress(base64.b85decode(ARITHMETIC_JPEG)), name="x")
    assert np.abs(pixels[:, :8].astype(int) - (200, 100, 50)).max() <= 2
    assert np.abs(pixels[:, 8:].astype(int) - (20, 120, 220)).max() <= 2


HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(50)


def test_heic_names_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)  # as if it were not installed
    with pytest.raises(PictureError, match=r"^IMG_1\.HEIC is HEIC, .*pip install pillow-heif") as raised:
        read(HEIC, name="IMG_1.HEIC")
    assert raised.value.reason == "plug-in"


def test_avif_is_read_by_any_name() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(buffer, "AVIF", quality=100)
    picture = read(buffer.getvalue(), name="x.jpg")
    assert picture.format == "AVIF"
    assert np.abs(picture.rgb.astype(int) - (200, 100, 50)).max() <= 2
