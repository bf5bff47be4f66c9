"""Writes picture files."""

import io

import numpy as np
from PIL import Image


def encode_png(image_u8: np.ndarray) -> bytes:
    """Lossless PNG file of a uint8 HWC RGB array."""
    buffer = io.BytesIO()
    Image.fromarray(image_u8).save(buffer, "PNG")
    return buffer.getvalue()
