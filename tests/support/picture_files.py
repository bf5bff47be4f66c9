"""Picture files and colour profiles with known values, written by hand: no library writes all of them."""

import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np

Curve = Callable[[np.ndarray], np.ndarray]
"""Linear light of levels in 0..1."""

D50 = (0.9642, 1.0, 0.8249)
D65_XY, D50_XY = (0.3127, 0.3290), (0.3457, 0.3585)
SRGB = (D65_XY, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = (D65_XY, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = (D65_XY, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = (D50_XY, (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
REC2020 = (D65_XY, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
Space = tuple[tuple[float, float], ...]
"""CIE x, y of white, red, green and blue."""

_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def srgb_curve(levels: np.ndarray) -> np.ndarray:
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)


def gamma(exponent: float) -> Curve:
    return lambda levels: levels**exponent


def to_d50(space: Space) -> np.ndarray:
    """Red, green and blue as columns of XYZ, white adapted to D50."""
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in space)
    colours = np.stack(primaries, axis=1)
    colours = colours * np.linalg.solve(colours, white)
    gains = (_BRADFORD @ np.array(D50)) / (_BRADFORD @ white)
    return np.asarray(np.linalg.solve(_BRADFORD, np.diag(gains) @ _BRADFORD) @ colours)


def in_srgb(levels: np.ndarray, space: Space, curve: Curve) -> np.ndarray:
    """What a viewer shows, 0..1, of levels in 0..1 of another space."""
    linear = curve(levels) @ to_d50(space).T @ np.linalg.inv(to_d50(SRGB)).T
    return srgb_levels(linear.clip(0, 1)).clip(0, 1)


# ICC profiles, version 2.4


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: np.ndarray | tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def table_curve(curve: Curve) -> bytes:
    points = np.rint(curve(np.linspace(0, 1, 4096)) * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(points)) + points.tobytes()


def gamma_curve(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def srgb_parametric() -> bytes:
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + b"".join(map(_fixed, numbers))


def rgb_profile(space: Space, curve: bytes) -> bytes:
    matrix, tags = to_d50(space), dict[bytes, bytes]()
    for column, name in enumerate((b"r", b"g", b"b")):
        tags |= {name + b"XYZ": _xyz(matrix[:, column]), name + b"TRC": curve}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(curve: bytes) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


TABLE_LEVELS = np.linspace(0, 1, 6)
"""At these levels, 51 of 255 apart, a profile with a table is exact."""


def table_profile(kind: str, srgb_of: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A profile for CMYK or RGB with a table of colours: `srgb_of` maps levels (..., channels) to sRGB."""
    num, size = len(kind), len(TABLE_LEVELS)
    levels = np.stack(np.meshgrid(*[TABLE_LEVELS] * num, indexing="ij"), axis=-1)
    xyz = srgb_curve(srgb_of(levels)) @ to_d50(SRGB).T / np.array(D50)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    lab = np.stack([(116 * y - 16) / 100 * 0xFF00, (500 * (x - y) + 128) * 256, (200 * (y - z) + 128) * 256])
    table = np.rint(np.moveaxis(lab, 0, -1)).clip(0, 65535).astype(">u2")
    identity = struct.pack(">HH", 0, 65535)
    head = b"mft2\0\0\0\0" + struct.pack(">4B", num, 3, size, 0)
    matrix = b"".join(map(_fixed, np.eye(3).ravel()))
    lut = head + matrix + struct.pack(">HH", 2, 2) + identity * num + table.tobytes() + identity * 3
    return _profile(b"prtr", kind.ljust(4).encode(), b"Lab ", {b"A2B0": lut})


def _profile(use: bytes, space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    common = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(D50),
    }
    start, index, body = 132 + 12 * (len(tags) + len(common)), b"", b""
    for name, data in {**common, **tags}.items():
        index += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12x4s", start + len(body), b"test", 0x02400000, use, space, connection, b"acsp"
    )
    head = head.ljust(68, b"\0") + b"".join(map(_fixed, D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags) + len(common)) + index + body


# PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of uint8 or uint16 pixels (height, width, 1 to 4 channels), with further chunks."""
    height, width, num_channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[num_channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, kind, 0, 0, 0)
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    size = len(rows) // height
    lines = b"".join(b"\0" + rows[row * size : (row + 1) * size] for row in range(height))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"x\0\0" + zlib.compress(profile)


def gama(exponent: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(exponent * 100_000))


def chrm(space: Space) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for xy in space for value in xy))
