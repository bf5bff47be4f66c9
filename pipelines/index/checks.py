"""What is asked of one picture, whatever it is compared with."""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from ctmsr.errors import PictureError
from ctmsr.image import Picture, read

from .looks import detail

if TYPE_CHECKING:
    from .scan import Settings

logger = logging.getLogger(__name__)


def open_picture(data: bytes, path: str) -> Picture:
    """Decodes a picture; logs what of it will not be seen."""
    picture = read(data, name=path)
    for warning in picture.warnings:
        logger.warning("%s", warning)
    return picture


def inspect(picture: Picture) -> dict[str, Any]:
    """Width and height as training sees them, and the format by the file's header, not its name."""
    height, width = picture.pixels.shape[:2]
    return {"width": width, "height": height, "format": picture.format}


def check_shape(row: dict[str, Any], path: str, settings: "Settings") -> None:
    """Raises PictureError for a picture that is too small or too narrow."""
    short, long = sorted((row["width"], row["height"]))
    size = f"{path} is {row['width']}x{row['height']} pixels"
    if short < settings.min_side:
        raise PictureError(f"{size}; both sides must be at least {settings.min_side}.", "too-small")
    if settings.max_aspect and long > settings.max_aspect * short:
        raise PictureError(
            f"{size}; one side may be at most {settings.max_aspect:g} times the other.", "too-narrow"
        )


def check_detail(grey_u8: np.ndarray, path: str, settings: "Settings") -> None:
    """Raises PictureError for a picture that is flat or blurred."""
    if settings.min_detail and (found := detail(grey_u8)) < settings.min_detail:
        raise PictureError(
            f"{path} is flat or blurred, except for {found:.3f} of its area; at least "
            f"{settings.min_detail:g} must have detail.",
            "no-detail",
        )
