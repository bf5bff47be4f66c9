"""Decode and crop images; the only place where pixel ranges and layouts convert.

`*_u8` arrays are uint8, HWC, RGB, 0..255. Tensors are float32, NCHW, [-1, 1]; the two are related by
x = u8 / 127.5 - 1.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .errors import DataError, PictureError

MAX_PIXELS = 89_478_485
"""Largest picture decoded: Pillow's own threshold for a suspected decompression bomb (256 MiB of RGB)."""

# Named so that Pillow never hands an upload to an interpreter (EPS, PDF) or an exotic parser.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")


def decode(data: bytes, *, name: str) -> np.ndarray:
    """Decodes a picture to 8-bit RGB, as viewers show it.

    EXIF orientation is applied, 16 bits are scaled to 8, and animations yield their first frame. Transparency
    is composited over white rather than dropped, as the colour of transparent pixels is a remnant of editing
    that nobody is meant to see. Colour profiles are ignored; pixels are taken as sRGB.

    Args:
        data: A whole JPEG, PNG, WebP, TIFF, BMP, GIF or PPM file.
        name: Key, path or URI of the picture, for the error message.

    Returns:
        uint8 of shape (height, width, 3), writable.

    Raises:
        PictureError: The bytes are empty, damaged or in another format ("unreadable"); they end too early
            ("truncated"); there are more than `MAX_PIXELS` pixels ("bomb"); or the pixels have no fixed white
            level, like 32-bit integers and floats ("mode"). Damage that leaves a valid stream, such as
            flipped bits in a JPEG's coefficients, goes undetected.
    """
    buffer = io.BytesIO(data)
    try:
        with Image.open(buffer, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(
                    f"{name} has {image.width}x{image.height} pixels, above the limit of {MAX_PIXELS}. "
                    "Downscale it, split it, or leave it out.",
                    "bomb",
                )
            return _rgb_u8(ImageOps.exif_transpose(image), name)
    except PictureError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise anything from OSError to struct.error
        said = str(error).replace(f" {buffer!r}", "")
        raise PictureError(
            f"{name} is not a readable picture ({len(data)} bytes; {type(error).__name__}: {said}). "
            f"It must be a complete file of one of {', '.join(FORMATS)}. Replace it or leave it out.",
            _reason(error),
        ) from error


def _reason(error: Exception) -> str:
    """The kind of defect that an error of Pillow's stands for."""
    if isinstance(error, Image.DecompressionBombError):
        return "bomb"
    said = str(error).lower()
    return (
        "truncated"
        if any(word in said for word in ("truncated", "too short", "not enough"))
        else "unreadable"
    )


def _rgb_u8(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255 instead of scaling
        grey = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise PictureError(
            f"{name} has pixels of Pillow mode {image.mode!r}, which have no fixed white level. "
            "Convert it to 8 or 16 bits a channel, or leave it out.",
            "mode",
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def encode_png(image_u8: np.ndarray) -> bytes:
    """Lossless PNG file of a uint8 HWC RGB array."""
    buffer = io.BytesIO()
    Image.fromarray(image_u8).save(buffer, "PNG")
    return buffer.getvalue()


def to_tensor(images_u8: np.ndarray | Tensor) -> Tensor:
    """NHWC uint8 in 0..255 to a new NCHW float32 in [-1, 1], on the device of the input."""
    # torch.tensor copies: arrays that arrive through shared memory are read-only.
    nhwc = images_u8 if isinstance(images_u8, Tensor) else torch.tensor(images_u8)
    return nhwc.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_u8(images: Tensor) -> np.ndarray:
    """NCHW floats, clamped to [-1, 1], to NHWC uint8 in 0..255, rounded to the nearest level."""
    levels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def random_crop(hr_u8: np.ndarray, size: int, rng: np.random.Generator, *, name: str) -> np.ndarray:
    """Square crop at a uniformly random position; a view unless padding is needed.

    A side shorter than `size` is first extended at its end by mirroring once, without repeating the edge.

    Args:
        hr_u8: uint8 of shape (height, width, 3).
        size: Side of the crop in pixels.
        rng: Source of the position.
        name: Identity of the picture, for the error message.

    Returns:
        uint8 of shape (size, size, 3).

    Raises:
        DataError: A side is shorter than size // 2 + 1, so mirroring once cannot fill the crop.
    """
    hr_u8 = _reflect_to(hr_u8, size, name)
    top, left = (int(rng.integers(side - size + 1)) for side in hr_u8.shape[:2])
    return hr_u8[top : top + size, left : left + size]


def center_crop(hr_u8: np.ndarray, size: int, *, name: str) -> np.ndarray:
    """As `random_crop`, but from the middle."""
    hr_u8 = _reflect_to(hr_u8, size, name)
    top, left = ((side - size) // 2 for side in hr_u8.shape[:2])
    return hr_u8[top : top + size, left : left + size]


def paired_crop(
    hr_u8: np.ndarray,
    lq_u8: np.ndarray,
    size: int,
    *,
    scale: int,
    rng: np.random.Generator | None,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Crops a picture and its LR picture at the same place: at random, or in the middle without `rng`.

    Args:
        hr_u8: uint8 of shape (height, width, 3).
        lq_u8: uint8, 1/scale of each side.
        size: Side of the HR crop in pixels, a multiple of `scale`.
        scale: HR/LQ ratio.
        rng: Source of the position.
        name: Identity of the picture, for the error message.

    Returns:
        uint8 of shape (size, size, 3) and (size // scale, size // scale, 3).

    Raises:
        DataError: The sides do not match, or one is shorter than the crop.
    """
    (height, width), (lq_height, lq_width) = hr_u8.shape[:2], lq_u8.shape[:2]
    if (height, width) != (scale * lq_height, scale * lq_width):
        raise DataError(
            f"{name} is {width}x{height} pixels and its LR picture {lq_width}x{lq_height}, not {scale} times "
            "smaller. Crop it, or leave the pair out."
        )
    if min(height, width) < size:
        raise DataError(
            f"{name} is {width}x{height} pixels, too small for a paired crop of {size}. Leave the pair "
            "out or lower the crop size."
        )
    spare = [side - size // scale for side in lq_u8.shape[:2]]
    top, left = (side // 2 if rng is None else int(rng.integers(side + 1)) for side in spare)
    rows, columns = (slice(start * scale, start * scale + size) for start in (top, left))
    lq_rows, lq_columns = (slice(start, start + size // scale) for start in (top, left))
    return hr_u8[rows, columns], lq_u8[lq_rows, lq_columns]


def random_flip(*images_u8: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The pictures as they are or, at even odds, all mirrored left to right, as views.

    For training crops, after the cut: an HR crop before it is degraded, or a pair together.

    Args:
        images_u8: uint8 HWC, of any sizes.
        rng: Source of the one decision, such as `sample_rng(seed, epoch, key, "flip")`.
    """
    return tuple(image[:, ::-1] for image in images_u8) if rng.random() < 0.5 else images_u8


def _reflect_to(hr_u8: np.ndarray, size: int, name: str) -> np.ndarray:
    height, width = hr_u8.shape[:2]
    if min(height, width) < size // 2 + 1:
        raise DataError(
            f"{name} is {width}x{height} pixels, too small for a crop of {size}: each side must be at least "
            f"{size // 2 + 1}. Leave the picture out or lower the crop size."
        )
    if min(height, width) >= size:
        return hr_u8
    return np.pad(hr_u8, ((0, max(0, size - height)), (0, max(0, size - width)), (0, 0)), mode="reflect")


def upsample(lq: Tensor, scale: int) -> Tensor:
    """`lq_up`: bicubic enlargement of `lq`, rounded to 8 bits like the picture file that it replaces.

    Args:
        lq: NCHW floats in [-1, 1].
        scale: HR/LQ ratio.

    Returns:
        float32 of shape (N, C, scale * H, scale * W) in [-1, 1]: a = -0.75, pixel centres aligned, rounded to
        multiples of 1/127.5.
    """
    lq_up = F.interpolate(lq.float(), scale_factor=scale, mode="bicubic", align_corners=False)
    return lq_up.add(1).mul(127.5).round().clamp(0, 255).div(127.5).sub(1)
