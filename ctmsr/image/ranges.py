"""The only place where pixel ranges and layouts convert.

`*_u8` arrays are uint8, HWC, RGB, 0..255. Tensors are float32, NCHW, [-1, 1]; the two are related by
x = u8 / 127.5 - 1.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_tensor(images_u8: np.ndarray | Tensor) -> Tensor:
    """NHWC uint8 in 0..255 to a new NCHW float32 in [-1, 1], on the device of the input."""
    # torch.tensor copies: arrays that arrive through shared memory are read-only.
    nhwc = images_u8 if isinstance(images_u8, Tensor) else torch.tensor(images_u8)
    return nhwc.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_u8(images: Tensor) -> np.ndarray:
    """NCHW floats, clamped to [-1, 1], to NHWC uint8 in 0..255, rounded to the nearest level."""
    levels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


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
