"""What a picture looks like, in numbers: how much of it has detail, and a hash of its looks."""

import cv2
import numpy as np

_BLOCK_PX = 32
_SHARP = 100
"""Variance of the Laplacian, in grey levels, from which a block is neither flat nor blurred."""


def detail(grey_u8: np.ndarray) -> float:
    """The fraction of a picture that has detail: of its blocks of 32 px, those that are not flat or blurred.

    Computed in integers, so that every machine finds the same.

    Args:
        grey_u8: (height, width). An incomplete block counts only if it is the only one.
    """
    height, width = grey_u8.shape
    tall, wide = min(_BLOCK_PX, height), min(_BLOCK_PX, width)
    rows, columns = height // tall, width // wide
    edges = cv2.Laplacian(grey_u8, cv2.CV_16S)[: rows * tall, : columns * wide].astype(np.int32)
    blocks = edges.reshape(rows, tall, columns, wide)
    total = blocks.sum(axis=(1, 3), dtype=np.int64)
    squares = (blocks**2).sum(axis=(1, 3), dtype=np.int64)
    area = tall * wide
    return float(np.mean(area * squares - total**2 >= _SHARP * area**2))


def look_hash(grey_u8: np.ndarray) -> int:
    """64 bits that hardly change when a picture is resized or compressed again: dHash.

    The picture is reduced to 9 x 8 pixels; a bit says whether a pixel is darker than its right neighbour
    (Krawetz, Kind of Like That, 2013).
    """
    tiny = cv2.resize(grey_u8, (9, 8), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(tiny[:, :-1] < tiny[:, 1:]).tobytes(), "big")
