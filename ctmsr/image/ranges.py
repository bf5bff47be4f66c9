"""The only place where pixel ranges and layouts convert.

`*_u8` arrays are uint8, HWC, RGB, 0..255. Tensors are float32, NCHW, [-1, 1]; the two are related by
x = u8 / 127.5 - 1. Pictures of 16 bits have 65535 in place of 255.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """NHWC uint8 or uint16 to a new NCHW float32 in [-1, 1], on the device of the input."""
    # torch.tensor copies: arrays that arrive through shared memory are read-only.
    nhwc = images if isinstance(images, Tensor) else torch.tensor(images)
    half = 32767.5 if nhwc.dtype == torch.uint16 else 127.5
    return nhwc.permute(0, 3, 1, 2).contiguous().float().div_(half).sub_(1)


def to_u8(images: Tensor) -> np.ndarray:
    """NCHW floats, clamped to [-1, 1], to NHWC uint8 in 0..255, rounded to the nearest level."""
    levels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_u16(images: Tensor) -> np.ndarray:
    """NCHW floats, clamped to [-1, 1], to NHWC uint16 in 0..65535, rounded to the nearest level."""
    levels = images.detach().float().add(1).mul(32767.5).round().clamp(0, 65535)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy().astype(np.uint16)


def upsample(lq: Tensor, scale: int, *, num_bits: int = 8) -> Tensor:
    """`lq_up`: bicubic enlargement of `lq`, rounded to 8 bits like the picture file that it replaces.

    Args:
        lq: NCHW floats in [-1, 1].
        scale: HR/LQ ratio.
        num_bits: 16 for pictures of 16 bits.

    Returns:
        float32 of shape (N, C, scale * H, scale * W) in [-1, 1]: a = -0.75, pixel centres aligned, rounded to
        multiples of 1/127.5, or 1/32767.5 for 16 bits.
    """
    most = 2**num_bits - 1
    lq_up = F.interpolate(lq.float(), scale_factor=scale, mode="bicubic", align_corners=False)
    return lq_up.add(1).mul(most / 2).round().clamp(0, most).div(most / 2).sub(1)
