"""Decoding is faithful or refuses; ranges convert exactly; crops are where they should be."""

import contextlib
import io
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ctmsr.errors import DataError
from ctmsr.image import MAX_PIXELS, center_crop, decode, encode_png, random_crop, random_flip
from ctmsr.image.ranges import to_tensor, to_u8, upsample
from ctmsr.rng import sample_rng


def noise_u8(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# decode


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_decode_exactly(file_format: str) -> None:
    image_u8 = noise_u8(20, 31)
    options = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(image_u8), file_format, **options), name="x"), image_u8
    )


def test_png_round_trip_is_exact_and_the_result_is_writable() -> None:
    image_u8 = noise_u8(5, 7)
    decoded = decode(encode_png(image_u8), name="x")
    np.testing.assert_array_equal(decoded, image_u8)
    assert decoded.flags.writeable


@pytest.mark.parametrize("size", [(301, 407), (3, 50_000), (50_000, 1), (181, 182)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_large_pictures_are_whole(size: tuple[int, int], mode: str) -> None:
    """Their pixels are copied in strips."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).convert(mode)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    np.testing.assert_array_equal(decode(file.getvalue(), name="x"), np.array(picture.convert("RGB")))


def test_exif_orientation_is_applied() -> None:
    image_u8 = np.zeros((16, 32, 3), np.uint8)
    image_u8[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: the viewer turns it 90 degrees clockwise, left becomes top
    decoded = decode(encoded(Image.fromarray(image_u8), "JPEG", exif=exif), name="x")
    assert decoded.shape == (32, 16, 3)
    assert decoded[:15].min() > 250
    assert decoded[17:].max() < 5


def test_grey_16_bit_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    for file_format in ("PNG", "TIFF"):
        decoded = decode(encoded(Image.fromarray(levels), file_format), name="x")
        assert decoded[0].tolist() == [[v, v, v] for v in (0, 0, 1, 128, 255)]


def test_grey_bilevel_and_palette_become_rgb() -> None:
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert decode(encoded(grey, "PNG"), name="x")[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    assert (
        decode(encoded(grey.convert("1", dither=Image.Dither.NONE), "PNG"), name="x")[0, 2].tolist()
        == [255] * 3
    )
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 150, 100])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, "PNG"), name="x")[0].tolist() == [[10, 20, 30], [200, 150, 100]]


def test_cmyk_jpeg_becomes_rgb() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = decode(encoded(red, "JPEG", quality=100), name="x")
    np.testing.assert_allclose(decoded.reshape(-1, 3).mean(0), [255, 0, 0], atol=4)


def test_transparency_is_composited_over_white() -> None:
    rgba = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    decoded = decode(encoded(Image.fromarray(rgba), "PNG"), name="x")
    assert decoded[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 204]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    assert decode(encoded(palette, "PNG", transparency=0), name="x")[0, 0].tolist() == [255, 255, 255]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, name="x")[0, 0].tolist() == [255, 0, 0]


PHOTO = Image.fromarray(noise_u8(64, 64))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><html><body>404</body></html>",
        POSTSCRIPT,
        encoded(PHOTO, "PNG")[:40],
        encoded(PHOTO, "PNG")[:6000],
        encoded(PHOTO, "JPEG")[:2000],
        encoded(PHOTO, "JPEG")[:-10],
        encoded(PHOTO, "WEBP")[:1000],
        encoded(PHOTO, "TIFF")[:6000],
        encoded(PHOTO, "BMP")[:6000],
    ],
    ids=["empty", "html", "eps", "png_head", "png", "jpeg", "jpeg_end", "webp", "tiff", "bmp"],
)
def test_damaged_pictures_are_refused_by_name_and_size(data: bytes) -> None:
    with pytest.raises(DataError, match=rf"^s3://b/cat\.jpg is not a readable picture \({len(data)} bytes"):
        decode(data, name="s3://b/cat.jpg")


def test_bit_flips_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(0)
    for file_format in ("PNG", "JPEG", "TIFF", "GIF"):
        data = np.frombuffer(encoded(PHOTO, file_format), np.uint8)
        for _ in range(50):
            damaged = data.copy()
            damaged[rng.integers(len(data), size=8)] ^= rng.integers(1, 256, 8, dtype=np.uint8)
            with contextlib.suppress(DataError):
                assert decode(damaged.tobytes(), name="x").shape[2] == 3


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to no pixels."""
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 30_000])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    assert side * side > MAX_PIXELS
    with pytest.raises(DataError, match=r"^bomb\.png .*(limit|exceeds)"):
        decode(png_header(side, side), name="bomb.png")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_level_are_refused(dtype: type) -> None:
    data = encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(DataError, match=r"^x\.tif has pixels of Pillow mode '[IF]'"):
        decode(data, name="x.tif")


# ranges and layouts


def test_every_level_survives_the_round_trip() -> None:
    images_u8 = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(1, 16, 16, 3)
    tensor = to_tensor(images_u8)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (1, 3, 16, 16)
    np.testing.assert_array_equal(tensor[0, 1].numpy(), images_u8[0, ..., 1] / np.float32(127.5) - 1)
    np.testing.assert_array_equal(to_u8(tensor), images_u8)
    assert torch.equal(to_tensor(torch.from_numpy(images_u8)), tensor)


def test_read_only_arrays_are_accepted_and_kept() -> None:
    images_u8 = noise_u8(4, 4)[None]
    images_u8.flags.writeable = False
    to_tensor(images_u8).zero_()
    np.testing.assert_array_equal(images_u8, noise_u8(4, 4)[None])


def test_to_u8_clamps_and_rounds_to_nearest() -> None:
    values = torch.tensor([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.0, 7.0]).view(1, 1, 1, 6)
    assert to_u8(values).ravel().tolist() == [0, 0, 0, 1, 255, 255]


# crops


def test_random_crop_reaches_every_position_and_keeps_pixels_together() -> None:
    hr_u8 = np.zeros((6, 5, 3), np.uint8)
    hr_u8[..., 0], hr_u8[..., 1] = np.arange(6)[:, None], np.arange(5)
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(200):
        crop = random_crop(hr_u8, 4, rng, name="x")
        top, left = crop[0, 0, :2].tolist()
        np.testing.assert_array_equal(crop, hr_u8[top : top + 4, left : left + 4])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(3) for left in range(2)}


def test_center_crop_takes_the_middle() -> None:
    hr_u8 = noise_u8(10, 7)
    np.testing.assert_array_equal(center_crop(hr_u8, 4, name="x"), hr_u8[3:7, 1:5])


def test_small_pictures_are_mirrored_at_the_end_without_repeating_the_edge() -> None:
    hr_u8 = np.repeat(np.arange(5, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(8, axis=1)
    expected = [0, 1, 2, 3, 4, 3, 2, 1]
    assert random_crop(hr_u8, 8, np.random.default_rng(0), name="x")[:, 0, 0].tolist() == expected
    assert center_crop(hr_u8, 8, name="x")[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(("size", "smallest"), [(8, 5), (7, 4)])
def test_the_smallest_picture_is_accepted_and_one_pixel_less_is_refused(size: int, smallest: int) -> None:
    assert center_crop(noise_u8(smallest, 20), size, name="x").shape == (size, size, 3)
    match = rf"^cat\.png is 20x{smallest - 1} pixels, .*at least {smallest}\."
    with pytest.raises(DataError, match=match):
        center_crop(noise_u8(smallest - 1, 20), size, name="cat.png")
    with pytest.raises(DataError, match=match):
        random_crop(noise_u8(smallest - 1, 20), size, np.random.default_rng(0), name="cat.png")


def test_a_flip_mirrors_a_pair_alike_at_even_odds_and_belongs_to_its_sample() -> None:
    hr_u8, lq_u8 = noise_u8(8, 12), noise_u8(2, 3)
    seen = []
    for epoch in range(200):
        hr, lq = random_flip(hr_u8, lq_u8, rng=sample_rng(0, epoch, "a.png", "flip"))
        (again,) = random_flip(hr_u8, rng=sample_rng(0, epoch, "a.png", "flip"))
        np.testing.assert_array_equal(again, hr)
        mirrored = not np.array_equal(hr, hr_u8)
        np.testing.assert_array_equal(hr, np.fliplr(hr_u8) if mirrored else hr_u8)
        np.testing.assert_array_equal(lq, np.fliplr(lq_u8) if mirrored else lq_u8)
        seen.append(mirrored)
    assert 75 < sum(seen) < 125


# upsample


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_upsample_is_torch_bicubic_on_the_8_bit_grid(scale: int) -> None:
    lq = to_tensor(noise_u8(12, 9)[None])
    lq_up = upsample(lq, scale)
    exact = F.interpolate(lq, scale_factor=scale, mode="bicubic", align_corners=False).clamp(-1, 1)
    assert lq_up.shape == (1, 3, 12 * scale, 9 * scale)
    assert (lq_up - exact).abs().max() <= 0.5 / 127.5 + 1e-5
    assert torch.equal(to_tensor(to_u8(lq_up)), lq_up)
    assert (exact == 1).any()  # white overshoot was there to clamp
    assert lq_up.abs().max() == 1


def test_upsample_keeps_a_constant() -> None:
    lq = to_tensor(np.full((1, 8, 8, 3), 77, np.uint8))
    assert to_u8(upsample(lq, 4)).tolist() == np.full((1, 32, 32, 3), 77).tolist()
