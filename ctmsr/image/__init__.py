"""Pictures: files to sRGB pixels and back, crops; in `ranges`, tensors.

Apart from `ranges`, nothing here imports torch: the tasks that read pictures start two seconds sooner.
"""

from .crops import center_crop, paired_crop, random_crop, random_flip
from .decoding import FORMATS, MAX_PIXELS, Picture, decode, header_size, over_white, read
from .encoding import encode_png

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
]
