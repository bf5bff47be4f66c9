"""A picture file to a larger one, or a refusal."""

from collections.abc import Callable

import numpy as np

from ctmsr.errors import PictureError
from ctmsr.image import FORMATS, header_size, read
from ctmsr.image.encoding import FileFormat, encode
from ctmsr.image.enlarging import enlarge

from .bombs import check_parts
from .limits import Limits, Refusal, padded_pixels


def check_picture(data: bytes, limits: Limits) -> int:
    """Checks a picture without decoding a pixel.

    Returns:
        How many pixels it has once it is padded, which is what it costs.

    Raises:
        Refusal: It is of no known format, or has more pixels or parts than allowed.
    """
    check_parts(data)
    most = f"at most {limits.max_pixels / 1e6:g} megapixels are accepted. Make it smaller, or crop it."
    try:
        width, height = header_size(data, name="The picture")
    except PictureError as error:
        if error.reason == "bomb":
            raise Refusal(413, f"The picture has more than 170 megapixels; {most}") from error
        if error.reason == "plug-in":
            raise Refusal(415, str(error)) from error
        known = f"{', '.join(FORMATS[:-1])} and {FORMATS[-1]} files"
        raise Refusal(415, f"This is not a picture: {known} are accepted.") from error
    named = f"The picture has {width} x {height} pixels"
    if width * height > limits.max_pixels:
        raise Refusal(413, f"{named}, {width * height / 1e6:.3g} megapixels; {most}")
    padded = padded_pixels(width, height)
    if padded > limits.max_padded_pixels:
        raise Refusal(413, f"{named}, which are padded to {padded / 1e6:.3g} megapixels; {most}")
    return padded


def enlarged(
    data: bytes, upscale: Callable[[np.ndarray], np.ndarray], kind: str, *, keeps_metadata: bool
) -> tuple[bytes, tuple[str, ...]]:
    """The enlarged picture as a file of `kind`, and what of the picture is not in it.

    Raises:
        Refusal: The picture is damaged, or cannot be a file of this kind.
    """
    try:
        lq = read(data, name="The picture")
    except PictureError as error:
        raise Refusal(422, "The picture is damaged or incomplete. Save it again, or send another.") from error
    file_format = FileFormat(kind=kind, keeps_metadata=keeps_metadata)
    sr = enlarge(lq, upscale)
    try:
        warnings = lq.warnings + file_format.check(sr, 1, "The picture")
    except PictureError as error:
        raise Refusal(422, str(error)) from error
    return encode(sr, file_format), warnings
