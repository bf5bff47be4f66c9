"""What is written has the pixels, says sRGB, and carries what an enlarged picture may still say."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base

from ctmsr.errors import ConfigError, PictureError
from ctmsr.image import Picture, over_white, read
from ctmsr.image.encoding import NOTE_BYTES, FileFormat, encode, has_note
from ctmsr.image.enlarging import enlarge
from tests.support.picture_files import chunk, png

NOISE = np.random.default_rng(0).integers(0, 65536, (9, 14, 4), dtype=np.uint16)
SMOOTH = np.linspace(40, 200, 32 * 48 * 4).reshape(32, 48, 4)
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" exif:PixelXDimension="32" '
    'exif:PixelYDimension="16" photoshop:ICCProfile="Display P3" GCamera:MotionPhoto="1" '
    'dc:creator="Ann"><tiff:ImageWidth>32</tiff:ImageWidth>'
    "<xmp:Thumbnails>/9j/4AAQ</xmp:Thumbnails></rdf:Description></x:xmpmeta>"
)


def twice(rgb: np.ndarray) -> np.ndarray:
    """A model that enlarges twice and invents nothing."""
    return rgb.repeat(2, axis=0).repeat(2, axis=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_png_is_exact_at_both_depths(num_channels: int, dtype: type) -> None:
    pixels: np.ndarray = NOISE[..., :num_channels].astype(dtype)
    data = encode(Picture(pixels, "PNG"), note="hello")
    made = read(data, name="x")
    np.testing.assert_array_equal(made.pixels, pixels)
    assert made.pixels.dtype == dtype
    assert has_note(data[:NOTE_BYTES], "hello")
    assert not has_note(data, "hello there")
    assert Image.open(io.BytesIO(data)).info["srgb"] == 0


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_jpeg_and_webp_are_close_and_smaller_with_less_quality(kind: str, num_channels: int) -> None:
    pixels = SMOOTH[..., :num_channels].astype(np.uint8)
    picture = Picture(pixels, "PNG")
    good, poor = (encode(picture, FileFormat(kind=kind, quality=quality), "hello") for quality in (95, 20))
    made = read(good, name="x")
    assert made.format == kind.upper()
    assert np.abs(over_white(made).astype(int) - over_white(picture)).max() <= 8
    assert (made.alpha is not None) == (kind == "webp" and num_channels % 2 == 0)
    assert len(poor) < len(good)
    for data in (good, poor):
        assert has_note(data[:NOTE_BYTES] + data[-NOTE_BYTES:], "hello")
    assert ("icc_profile" in Image.open(io.BytesIO(good)).info) == (made.pixels.shape[2] > 1)


def phone_photo() -> bytes:
    """A JPEG that is stored on its side, with a thumbnail, a date and a place."""
    exif = Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = 6, "Phone"
    exif[Base.XResolution], exif[Base.YResolution], exif[Base.ResolutionUnit] = 72, 72, 2
    exif[IFD.Exif] = {
        Base.DateTimeOriginal: "2024:05:06 07:08:09",
        Base.ColorSpace: 65535,
        Base.ExifImageWidth: 32,
        Base.ExifImageHeight: 16,
        Base.MakerNote: b"maker" * 4,
    }
    exif[IFD.GPSInfo] = {GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: (52.0, 31.0, 12.0)}
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), "teal").save(buffer, "JPEG", exif=exif, xmp=XMP.encode(), dpi=(300, 300))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_metadata_is_kept_and_made_true(kind: str) -> None:
    data = encode(enlarge(read(phone_photo(), name="x"), twice), FileFormat(kind=kind))
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        exif = image.getexif()
        assert image.size == (32, 64)
        assert (exif[Base.Orientation], exif[Base.Make]) == (1, "Phone")
        assert exif[Base.XResolution] == 600
        details = exif.get_ifd(IFD.Exif)
        assert (details[Base.ExifImageWidth], details[Base.ExifImageHeight]) == (32, 64)
        assert details[Base.DateTimeOriginal] == "2024:05:06 07:08:09"
        assert details[Base.ColorSpace] == 1
        assert details[Base.MakerNote] == b"maker" * 4
        assert exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitude] == (52.0, 31.0, 12.0)
        assert exif.get_ifd(IFD.IFD1) == {}
        if kind != "webp":
            assert image.info["dpi"] == pytest.approx((600, 600), rel=1e-4)
    xmp = read(data, name="x").metadata.xmp
    assert 'tiff:Orientation="1" exif:PixelXDimension="32" exif:PixelYDimension="64"' in xmp
    assert 'ICCProfile="sRGB IEC61966-2.1" GCamera:MotionPhoto="0" dc:creator="Ann"' in xmp
    assert "<tiff:ImageWidth>32</tiff:ImageWidth>" in xmp
    assert "Thumbnails" not in xmp


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_metadata_can_be_left_out(kind: str) -> None:
    big = enlarge(read(phone_photo(), name="x"), twice)
    with Image.open(io.BytesIO(encode(big, FileFormat(kind=kind, keeps_metadata=False)))) as image:
        image.load()
        assert not {"exif", "xmp", "XML:com.adobe.xmp", "dpi"} & set(image.info)


@pytest.mark.parametrize("dpi", [(300, 300), (96, 48)])
def test_the_resolution_of_other_formats(dpi: tuple[int, int]) -> None:
    for kind in ("PNG", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, kind, dpi=dpi)
        metadata = enlarge(read(buffer.getvalue(), name="x"), twice).metadata
        assert metadata.dpi == pytest.approx([2 * value for value in dpi], rel=0.01)
    webp = encode(enlarge(read(buffer.getvalue(), name="x"), twice), FileFormat(kind="webp"))
    assert read(webp, name="x").metadata.dpi == pytest.approx([2 * value for value in dpi], rel=0.01)


def test_a_resolution_that_nobody_stated_is_not_invented() -> None:
    exif = Image.Exif()
    exif[Base.Make] = "Phone"
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG", exif=exif)
    assert read(buffer.getvalue(), name="x").metadata.dpi is None  # Pillow says 72


def test_metadata_is_bounded_and_damaged_metadata_is_left_out() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    long_exif = b"MM\0*\0\0\0\x08\0\0" + bytes(100_000)
    for name, data in {
        "EXIF": png(pixels, (b"eXIf", long_exif)),
        "XMP": png(pixels, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 100_000)),
    }.items():
        picture = read(data, name="cat.png")
        assert picture.warnings[0].startswith(f"cat.png: its {name} is left out (")
        assert len(encode(picture)) < 500
    behind = png(pixels)
    behind = behind[:-12] + chunk(b"eXIf", long_exif) + behind[-12:]
    assert "EXIF is left out" in read(behind, name="cat.png").warnings[0]
    broken = png(pixels, (b"eXIf", b"MM\0*\0\0\0\x08\0\x05\1\x0f\0\2"))
    assert read(broken, name="x").pixels.shape == (2, 2, 3)
    largest = Image.Exif()
    largest[Base.Artist] = "A" * 64_900
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=largest, xmp=b"x" * 65_000)
    kept = read(buffer.getvalue(), name="x")
    assert kept.warnings == ()
    assert read(encode(kept, FileFormat(kind="jpeg")), name="x").metadata == kept.metadata


def disc(depth: int) -> np.ndarray:
    """A white disc on transparent black."""
    y, x = np.mgrid[:32, :32] - 15.5
    most = 2**depth - 1
    pixels: np.ndarray = np.where(np.hypot(y, x)[..., None] < 10, most, 0).repeat(4, axis=2)
    return pixels.astype(np.uint8 if depth == 8 else np.uint16)


def blurring(rgb: np.ndarray) -> np.ndarray:
    """A model that mixes a pixel with those around it."""
    size = (2 * rgb.shape[1], 2 * rgb.shape[0])
    channels = (Image.fromarray(rgb[..., i].astype(np.float32)) for i in range(3))
    planes = [np.asarray(channel.resize(size, Image.Resampling.LANCZOS)) for channel in channels]
    most = np.iinfo(rgb.dtype).max
    return np.rint(np.stack(planes, axis=2)).clip(0, most).astype(rgb.dtype)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("is_grey", [True, False])
def test_transparency_is_enlarged_without_a_halo(is_grey: bool, depth: int) -> None:
    pixels = disc(depth)[..., -2:] if is_grey else disc(depth)
    big = enlarge(Picture(pixels, "PNG"), blurring)
    assert big.pixels.shape == (64, 64, 2 if is_grey else 4)
    assert big.pixels.dtype == pixels.dtype
    assert big.alpha is not None
    assert (big.rgb[big.alpha > 0] == 2**depth - 1).all()  # white to the very edge
    exact = twice(pixels)[..., -1]
    assert (big.alpha[exact == big.alpha].size / exact.size) > 0.85
    assert big.alpha.max() == 2**depth - 1
    assert big.alpha.min() == 0
    clear = Picture(np.zeros((4, 4, 4), np.uint8), "PNG")
    assert not enlarge(clear, blurring).pixels.any()


def test_grey_stays_grey_and_what_surrounds_it_stays() -> None:
    picture = Picture(NOISE[..., :1], "PNG", warnings=("x: it is animated.",))
    big = enlarge(picture, twice)
    np.testing.assert_array_equal(big.pixels, twice(NOISE[..., :1]))
    assert big.warnings == picture.warnings


def test_a_side_that_a_format_has_no_room_for_is_refused_before() -> None:
    wide = Picture(np.zeros((1, 5000, 3), np.uint8), "PNG")
    assert FileFormat(kind="jpeg").check(wide, 4, "x") == ()
    with pytest.raises(
        PictureError, match=r"^x enlarged would have a side of 20000 pixels; webp allows 16383"
    ):
        FileFormat(kind="webp").check(wide, 4, "x")
    clear = Picture(np.zeros((1, 1, 4), np.uint8), "PNG")
    assert "JPEG has no transparency" in FileFormat(kind="jpeg").check(clear, 4, "x")[0]


def test_other_formats_and_qualities_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of png, jpeg, webp, got 'gif'"):
        FileFormat(kind="gif")
    with pytest.raises(ConfigError, match="from 1 to 100, got 0"):
        FileFormat(quality=0)
