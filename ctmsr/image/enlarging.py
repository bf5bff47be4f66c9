"""Enlarges all of a picture with a model that enlarges RGB: grey stays grey, transparency stays."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.ndimage import distance_transform_edt

from .decoding import Picture
from .ranges import to_tensor, to_u8, to_u16, upsample

Upscale = Callable[[np.ndarray], np.ndarray]
"""Takes uint8 or uint16 (height, width, 3), and returns the same enlarged."""


def enlarge(picture: Picture, upscale: Upscale) -> Picture:
    """The picture enlarged by `upscale`, with the depth, the kind of channels and the metadata that it has.

    Alpha is enlarged by a bicubic filter. Transparent pixels have arbitrary colours, which the model would
    mix into the edges of what is visible; so they first get the colour of the nearest visible pixel.
    """
    rgb, alpha = picture.rgb, picture.alpha
    if alpha is not None:
        rgb = _filled(rgb, alpha)
    sr = upscale(rgb)
    scale = len(sr) // len(rgb)
    channels = [np.rint(sr.mean(axis=2, keepdims=True)).astype(sr.dtype) if picture.is_grey else sr]
    if alpha is not None:
        num_bits = 8 * alpha.itemsize
        alpha_up = upsample(to_tensor(alpha[None, ..., None]), scale, num_bits=num_bits)
        channels.append((to_u8 if num_bits == 8 else to_u16)(alpha_up)[0].astype(sr.dtype))
    height, width = sr.shape[:2]
    return replace(
        picture,
        pixels=np.concatenate(channels, axis=2) if len(channels) > 1 else channels[0],
        metadata=picture.metadata.enlarged(scale, width, height),
    )


def _filled(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """With the colour of the nearest visible pixel wherever alpha is 0."""
    if alpha.all() or not alpha.any():
        return rgb
    rows, columns = distance_transform_edt(alpha == 0, return_distances=False, return_indices=True)
    filled: np.ndarray = rgb[rows, columns]
    return filled
