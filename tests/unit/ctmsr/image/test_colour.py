"""Colours of any declared space come out as sRGB, at most two levels of 255 from the formulas."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ctmsr.image import Picture, decode, read
from tests.support.picture_files import (
    ADOBE,
    D50,
    P3,
    PROPHOTO,
    REC2020,
    SRGB,
    TABLE_LEVELS,
    Curve,
    Space,
    chrm,
    gama,
    gamma,
    gamma_curve,
    grey_profile,
    iccp,
    in_srgb,
    png,
    rgb_profile,
    srgb_curve,
    srgb_levels,
    srgb_parametric,
    table_curve,
    table_profile,
    to_d50,
)

LINEAR = b"curv\0\0\0\0\0\0\0\0"
SPACES: dict[str, tuple[Space, Curve, bytes]] = {
    "p3": (P3, srgb_curve, srgb_parametric()),
    "p3-by-a-table": (P3, srgb_curve, table_curve(srgb_curve)),
    "adobe": (ADOBE, gamma(563 / 256), gamma_curve(563 / 256)),
    "prophoto": (PROPHOTO, gamma(1.8), gamma_curve(1.80078125)),
    "rec2020-linear": (REC2020, gamma(1), LINEAR),
    "linear": (SRGB, gamma(1), LINEAR),
}


def colours(depth: int = 8) -> np.ndarray:
    """(27, 35, 3): greys from black to white, dark ones closely spaced, and random colours."""
    most = 2**depth - 1
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, most + 1, (27, 35, 3))
    pixels[0] = np.linspace(0, most, 35).astype(int)[:, None]
    pixels[1] = np.linspace(0, most / 20, 35).astype(int)[:, None]
    return pixels.astype(np.uint8 if depth == 8 else np.uint16)


def file(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(pixels)
    if mode is not None:
        image = Image.frombytes(mode, image.size, pixels.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def off(picture: Picture, expected: np.ndarray) -> float:
    """The largest difference in levels of 255; `expected` is in 0..1."""
    most = np.iinfo(picture.pixels.dtype).max
    return float(np.abs(picture.rgb / most - expected).max() * 255)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("name", SPACES)
def test_a_profile_is_followed(name: str, depth: int) -> None:
    space, curve, tag = SPACES[name]
    pixels = colours(depth)
    expected = in_srgb(pixels / (2**depth - 1), space, curve)
    picture = read(png(pixels, iccp(rgb_profile(space, tag))), name="x")
    assert picture.warnings == ()
    assert picture.is_deep == (depth == 16)
    assert off(picture, expected) <= 2
    assert np.abs(picture.rgb / (2**depth - 1) - expected).mean() * 255 <= (0.3 if depth == 8 else 0.05)


def test_it_is_followed_in_every_format() -> None:
    pixels = np.full((16, 16, 3), (230, 60, 40), np.uint8)
    icc = rgb_profile(P3, srgb_parametric())
    assert np.allclose(in_srgb(pixels[0, 0] / 255, P3, srgb_curve) * 255, (251, 31, 13), atol=1)
    files = {
        "JPEG": file(pixels, "JPEG", icc_profile=icc, quality=100, subsampling=0),
        "PNG": file(pixels, "PNG", icc_profile=icc),
        "WEBP": file(pixels, "WEBP", icc_profile=icc, lossless=True),
        "TIFF": file(pixels, "TIFF", icc_profile=icc),
    }
    for kind, data in files.items():
        assert np.abs(decode(data, name=kind).astype(int) - (251, 31, 13)).max() <= 2, kind


def test_sixteen_bits_stay_sixteen_through_a_profile() -> None:
    pixels = np.linspace(20_000, 21_000, 1000).astype(np.uint16)[None, :, None].repeat(3, axis=2)
    for icc in (rgb_profile(ADOBE, gamma_curve(2.2)), table_profile("RGB", paler)):
        made = read(png(pixels, iccp(icc)), name="x").rgb[0, :, 0]
        assert np.diff(made.astype(int)).min() >= -2
        assert len(np.unique(made)) > 500


def paler(levels: np.ndarray) -> np.ndarray:
    """Black and white stay, as black point compensation is part of the perceptual intent."""
    return np.asarray(0.7 * levels + 0.3 * levels.mean(axis=-1, keepdims=True))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("exponent", [1.0, 1.8, 2.2])
def test_grey_with_a_profile_stays_grey(exponent: float, depth: int) -> None:
    pixels = np.linspace(0, 2**depth - 1, 256).astype(np.uint8 if depth == 8 else np.uint16)[None, :, None]
    expected = srgb_levels((pixels / (2**depth - 1)) ** exponent)
    picture = read(png(pixels, iccp(grey_profile(gamma_curve(exponent)))), name="x")
    assert picture.is_grey
    assert off(picture, expected.repeat(3, axis=2)) <= (1 if depth == 8 else 0.6)
    in_rgb = rgb_profile(SRGB, gamma_curve(exponent))  # as many programs write it
    np.testing.assert_array_equal(read(png(pixels, iccp(in_rgb)), name="x").pixels, picture.pixels)


def cmyk_in_srgb(levels: np.ndarray) -> np.ndarray:
    return np.asarray((1 - levels[..., :3]) * (1 - levels[..., 3:]))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_with_a_profile(kind: str) -> None:
    levels = np.random.default_rng(0).choice(TABLE_LEVELS, (4, 4, 4))
    levels = levels.repeat(16, axis=0).repeat(16, axis=1)  # whole blocks of a JPEG
    pixels = np.rint(levels * 255).astype(np.uint8)
    icc = table_profile("CMYK", lambda ink: cmyk_in_srgb(ink) ** 0.8)
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    picture = read(file(pixels, kind, "CMYK", icc_profile=icc, **options), name="x")
    assert picture.warnings == ()
    assert off(picture, cmyk_in_srgb(levels) ** 0.8) <= 2


def test_rgb_with_a_table_of_colours() -> None:
    levels = np.random.default_rng(0).choice(TABLE_LEVELS, (8, 9, 3))
    icc = table_profile("RGB", paler)
    for most, dtype in ((255, np.uint8), (65535, np.uint16)):
        picture = read(png(np.rint(levels * most).astype(dtype), iccp(icc)), name="x")
        assert off(picture, paler(levels)) <= 2


def test_lab() -> None:
    lab = np.random.default_rng(0).integers((60, 98, 98), (240, 158, 158), (9, 11, 3)).astype(np.uint8)
    light, a, b = np.moveaxis(lab / np.array([2.55, 1, 1]) - (0, 128, 128), -1, 0)
    f = np.stack([(light + 16) / 116 + a / 500, (light + 16) / 116, (light + 16) / 116 - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * D50
    expected = srgb_levels((xyz @ np.linalg.inv(to_d50(SRGB)).T).clip(0, 1))
    signed = lab ^ np.array([0, 128, 128], np.uint8)
    made = read(file(signed, "TIFF", "LAB"), name="x").rgb
    differences = np.abs(made - expected * 255)
    assert differences.mean() < 0.7  # LittleCMS interpolates in a table, coarsely where colours are saturated
    assert np.quantile(differences, 0.95) < 2


def cicp(*numbers: int) -> tuple[bytes, bytes]:
    return b"cICP", bytes(numbers)


@pytest.mark.parametrize(
    ("chunks", "space", "curve"),
    [
        ([cicp(12, 13, 0, 1)], P3, srgb_curve),
        ([cicp(9, 8, 0, 1)], REC2020, gamma(1)),
        ([cicp(1, 4, 0, 1)], SRGB, gamma(2.2)),
        ([cicp(1, 13, 0, 1)], SRGB, srgb_curve),
        ([gama(1.0)], SRGB, gamma(1)),
        ([gama(1 / 1.8)], SRGB, gamma(1.8)),
        ([gama(1 / 2.2), chrm(ADOBE)], ADOBE, gamma(2.2)),
        ([chrm(P3)], P3, srgb_curve),
        ([gama(1 / 2.2)], SRGB, srgb_curve),  # the traditional way to say sRGB
        ([gama(1 / 2.2), chrm(SRGB)], SRGB, srgb_curve),
        # What comes first in PNG's order of precedence:
        ([cicp(12, 13, 0, 1), iccp(rgb_profile(ADOBE, LINEAR)), gama(1.0)], P3, srgb_curve),
        ([iccp(rgb_profile(P3, srgb_parametric())), gama(1.0)], P3, srgb_curve),
        ([(b"sRGB", b"\0"), gama(1.0), chrm(ADOBE)], SRGB, srgb_curve),
        ([iccp(rgb_profile(SRGB, srgb_parametric()))], SRGB, srgb_curve),
    ],
)
@pytest.mark.parametrize("depth", [8, 16])
def test_the_colour_chunks_of_png(
    chunks: list[tuple[bytes, bytes]], space: Space, curve: Curve, depth: int
) -> None:
    pixels = colours(depth)
    picture = read(png(pixels, *chunks), name="x")
    assert picture.warnings == ()
    assert off(picture, in_srgb(pixels / (2**depth - 1), space, curve)) <= 1.5
    if (space, curve) == (SRGB, srgb_curve):
        np.testing.assert_array_equal(picture.pixels, pixels)
    grey = read(png(pixels[..., :1], *[c for c in chunks if c[0] != b"iCCP"]), name="x")
    assert grey.is_grey


@pytest.mark.parametrize("depth", [8, 16])
def test_a_palette_and_transparency_take_part_and_alpha_does_not(depth: int) -> None:
    icc = iccp(rgb_profile(P3, srgb_parametric()))
    pixels = colours(depth)
    alpha = pixels[::-1, :, :1]
    picture = read(png(np.concatenate([pixels, alpha], axis=2), icc), name="x")
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha, alpha[..., 0])
    np.testing.assert_array_equal(picture.rgb, read(png(pixels, icc), name="x").rgb)

    palette = Image.new("P", (1, 1))
    palette.putpalette([230, 60, 40])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", icc_profile=rgb_profile(P3, srgb_parametric()))
    np.testing.assert_allclose(decode(buffer.getvalue(), name="x")[0, 0], (251, 31, 13), atol=1)


P3_ICC = rgb_profile(P3, srgb_parametric())


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ([iccp(b"no profile at all")], "ICC profile is damaged"),
        ([(b"iCCP", b"x\0\0no zlib stream")], "ICC profile is damaged"),
        ([iccp(P3_ICC[:200])], "ICC profile is damaged"),
        ([iccp(grey_profile(LINEAR))], "ICC profile is for GRAY, its pixels are RGB"),
        ([iccp(table_profile("CMYK", cmyk_in_srgb))], "ICC profile is for CMYK, its pixels are RGB"),
        ([cicp(9, 16, 0, 1)], "high dynamic range"),
        ([cicp(12, 13, 1, 1)], "not supported"),
        ([gama(0)], "gamma of 0.0 is not in"),
        ([chrm((*SRGB[:3], SRGB[2]))], "no colours have the primaries"),
    ],
)
@pytest.mark.parametrize("depth", [8, 16])
def test_what_cannot_be_followed_is_ignored_and_told(
    chunks: list[tuple[bytes, bytes]], why: str, depth: int
) -> None:
    pixels = colours(depth)
    picture = read(png(pixels, *chunks), name="s3://b/cat.png")
    (warning,) = picture.warnings
    assert warning.startswith("s3://b/cat.png: it")
    assert why in warning
    assert warning.endswith("; its colours may be wrong.")
    np.testing.assert_array_equal(picture.pixels, pixels)


def test_a_broken_profile_leaves_the_next_declaration() -> None:
    picture = read(png(colours(), iccp(b"broken"), gama(1.0)), name="x")
    assert len(picture.warnings) == 1
    assert off(picture, in_srgb(colours() / 255, SRGB, gamma(1))) <= 1


def test_decode_logs_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    data = png(colours(), iccp(b"broken"))
    with caplog.at_level(logging.WARNING):
        decode(data, name="only-here.png")
        decode(data, name="only-here.png")
    assert [record.message.split(":")[0] for record in caplog.records] == ["only-here.png"]


def test_damaged_profiles_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(0)
    for whole in (P3_ICC, grey_profile(table_curve(gamma(1.8))), table_profile("RGB", lambda rgb: rgb)):
        for _ in range(40):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(128, 400, 6)] = rng.integers(0, 256, 6, np.uint8)
            for pixels in (colours(8)[:2], colours(16)[:2], colours(16)[:2, :, :1]):
                assert read(png(pixels, iccp(damaged.tobytes())), name="x").pixels.shape == pixels.shape


def test_a_profile_that_unpacks_to_megabytes_is_a_bomb() -> None:
    bomb = (b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000)))
    with pytest.raises(Exception, match=r"^x is not a readable picture .*too large") as raised:
        read(png(colours(), bomb), name="x")
    assert raised.value.reason == "bomb"  # type: ignore[attr-defined]
    count = struct.pack(">I", 0xFFFFFFFF)  # of a curve's points
    tag = b"curv\0\0\0\0" + count + bytes(100)
    assert read(png(colours(16), iccp(rgb_profile(P3, tag))), name="x").warnings
