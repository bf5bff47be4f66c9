"""Pictures: files to sRGB pixels and back, crops, and every change of range or layout."""

from .crops import center_crop, paired_crop, random_crop, random_flip
from .decoding import FORMATS, MAX_PIXELS, Picture, decode, header_size, over_white, read
from .encoding import encode_png
from .ranges import to_tensor, to_u8, to_u16, upsample

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "Picture",
    "center_crop",
    "decode",
    "encode_png",
    "header_size",
    "over_white",
    "paired_crop",
    "random_crop",
    "random_flip",
    "read",
    "to_tensor",
    "to_u8",
    "to_u16",
    "upsample",
]
