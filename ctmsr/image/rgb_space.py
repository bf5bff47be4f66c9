"""RGB colour spaces of three primaries and a curve, converted to sRGB with 16 bits of precision.

LittleCMS does the work for pictures of 8 bits, but Pillow hands it no more than that. Here is what 16-bit
pictures and the colour chunks of PNG need: the simple kind of ICC profile, which cameras, screens and
renderers use. Profiles with tables of colours go through LittleCMS at any depth: see `colour.py`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Curve = np.ndarray
"""float64 (65536,): the linear light, 0..1, of each 16-bit level."""

LEVELS = np.linspace(0, 1, 1 << 16)
_ROWS_OF_PIXELS = 1 << 20
"""Pixels converted at a time: a few dozen megabytes of floats."""

# ITU-T H.273: CIE 1931 chromaticities of white, red, green and blue.
_D65 = (0.3127, 0.3290)
SRGB_PRIMARIES = (_D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
PRIMARIES = {
    1: SRGB_PRIMARIES,
    5: (_D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: (_D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: (_D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    22: (_D65, (0.630, 0.340), (0.295, 0.605), (0.155, 0.077)),
}
"""By their number in H.273, which cICP uses."""
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_SRGB_D50 = np.array(
    [[0.4360657, 0.3851471, 0.1430664], [0.2224884, 0.7168732, 0.0606079], [0.0139160, 0.0970764, 0.7140961]]
)
"""Red, green and blue of sRGB as columns of XYZ, adapted to D50: as its ICC profiles have them."""


def srgb_curve(levels: np.ndarray) -> np.ndarray:
    """Linear light of sRGB levels in 0..1 (IEC 61966-2-1)."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    """The inverse of `srgb_curve`."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** np.float32(1 / 2.4) - 0.055)


def _bt709_curve(levels: np.ndarray) -> np.ndarray:
    return np.where(levels < 0.081, levels / 4.5, ((levels + 0.099) / 1.099) ** (1 / 0.45))


CURVES: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: _bt709_curve,
    4: lambda levels: levels**2.2,
    5: lambda levels: levels**2.8,
    6: _bt709_curve,
    8: lambda levels: levels,
    13: srgb_curve,
    14: _bt709_curve,
    15: _bt709_curve,
}
"""By their number in H.273. PQ (16) and HLG (18) are left out: how bright their white is, is a choice."""


@dataclass(frozen=True)
class RgbSpace:
    """A colour space whose pixels are linear light, except for a curve."""

    curves: tuple[Curve, Curve, Curve]
    """Of red, green and blue."""
    to_srgb: np.ndarray
    """(3, 3): from its linear light to sRGB's."""

    @cached_property
    def _tables(self) -> np.ndarray:
        return np.stack(self.curves).astype(np.float32)

    def convert(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 or uint16 (height, width, 3) to sRGB of the same depth; colours outside sRGB are clipped."""
        most = np.iinfo(pixels.dtype).max
        tables = self._tables[:, :: 65535 // most]
        matrix = self.to_srgb.astype(np.float32).T
        made = np.empty_like(pixels)
        num_rows = max(1, _ROWS_OF_PIXELS // pixels.shape[1])
        for top in range(0, len(pixels), num_rows):
            rows = pixels[top : top + num_rows]
            linear = np.stack([tables[i][rows[..., i]] for i in range(3)], axis=-1) @ matrix
            made[top : top + num_rows] = np.rint(srgb_levels(linear.clip(0, 1)) * most)
        return made


def grey_levels(curve: Curve) -> np.ndarray:
    """uint16 (65536,): the sRGB level of each 16-bit level of a grey picture."""
    levels: np.ndarray = np.rint(srgb_levels(curve.clip(0, 1)) * 65535).astype(np.uint16)
    return levels


def from_chromaticities(xy: tuple[tuple[float, float], ...], curve: Curve) -> RgbSpace:
    """A space by the CIE 1931 x, y of its white, red, green and blue.

    Raises:
        ValueError: No such space exists.
    """
    matrix = _xyz_d65(SRGB_PRIMARIES)
    try:
        to_srgb = np.linalg.solve(matrix, _xyz_d65(xy))
    except (ZeroDivisionError, np.linalg.LinAlgError) as error:
        raise ValueError(f"no colours have the primaries {xy}") from error
    if not np.isfinite(to_srgb).all():
        raise ValueError(f"no colours have the primaries {xy}")
    return RgbSpace((curve, curve, curve), to_srgb)


def _xyz_d65(xy: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Red, green and blue as columns of XYZ, adapted to the white of sRGB by Bradford's method."""
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in xy)
    colours = np.stack(primaries, axis=1)
    colours = colours * np.linalg.solve(colours, white)
    x, y = _D65
    d65 = np.array([x / y, 1, (1 - x - y) / y])
    gains = (_BRADFORD @ d65) / (_BRADFORD @ white)
    adapted: np.ndarray = np.linalg.solve(_BRADFORD, np.diag(gains) @ _BRADFORD) @ colours
    return adapted


# ICC.1:2022, the profile format.


def from_profile(icc: bytes) -> RgbSpace | Curve | None:
    """The space of an RGB profile, or the curve of a grey one; None if it is not of the simple kind.

    Raises:
        ValueError: The profile is damaged.
    """
    try:
        tags = _tags(icc)
        if any(tag in tags for tag in (b"A2B0", b"A2B1")):  # tables take precedence over curves
            return None
        if b"kTRC" in tags:
            return _curve(tags[b"kTRC"])
        curves = [_curve(tags[tag]) for tag in (b"rTRC", b"gTRC", b"bTRC")]
        colours = [struct.unpack(">3i", tags[tag][8:20]) for tag in (b"rXYZ", b"gXYZ", b"bXYZ")]
    except KeyError:
        return None
    except (struct.error, ZeroDivisionError) as error:
        raise ValueError(str(error)) from error
    xyz = np.array(colours, np.float64).T / 65536
    return RgbSpace((curves[0], curves[1], curves[2]), np.linalg.solve(_SRGB_D50, xyz))


def _tags(icc: bytes) -> dict[bytes, memoryview]:
    (count,) = struct.unpack_from(">I", icc, 128)
    view, found = memoryview(icc), {}  # tags may overlap, so copies could add up to any size
    for place in range(132, 132 + 12 * min(count, 100), 12):
        name, start, size = struct.unpack_from(">4sII", icc, place)
        found[name] = view[start : start + size]
    return found


def _curve(tag: memoryview) -> Curve:
    kind = bytes(tag[:4])
    if kind == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count == 0:
            return LEVELS
        if count == 1:
            return np.asarray(LEVELS ** (struct.unpack_from(">H", tag, 12)[0] / 256))
        points = np.frombuffer(tag, ">u2", count, 12) / 65535
        return np.interp(LEVELS, np.linspace(0, 1, count), points)
    if kind == b"para":
        (form,) = struct.unpack_from(">H", tag, 8)
        number = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}.get(form)
        if number is None:
            raise ValueError(f"curves of form {form} do not exist")
        g, *rest = (value / 65536 for value in struct.unpack_from(f">{number}i", tag, 12))
        return _parametric(g, rest)
    raise ValueError(f"curves of type {kind!r} do not exist")


def _parametric(g: float, rest: list[float]) -> Curve:
    """Y = (a X + b)^g + e from X = d on, c X + f below; 1 to 7 parameters, in the order g a b c d e f."""
    a, b, c, d, e, f = {
        0: lambda: (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        2: lambda: (*rest, 0.0, -rest[1] / rest[0], 0.0, 0.0),
        3: lambda: (*rest[:2], 0.0, -rest[1] / rest[0], rest[2], rest[2]),
        4: lambda: (*rest, 0.0, 0.0),
        6: lambda: rest,
    }[len(rest)]()
    with np.errstate(all="ignore"):
        curve = np.where(d <= LEVELS, np.maximum(a * LEVELS + b, 0) ** g + e, c * LEVELS + f)
    if not np.isfinite(curve).all():
        raise ValueError("a curve is not finite")
    return curve
