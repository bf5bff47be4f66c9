"""DISTS, similarity of structure and texture: Ding, Ma, Wang and Simoncelli 2020, arXiv:2004.07728.

Unlike LPIPS it tolerates a texture that is another sample of the same kind, which is what generative models
produce. The learned weights in dists_weights.safetensors are those of the authors' package DISTS-pytorch 0.1
(Copyright (c) 2020 Keyan Ding, MIT License; its text is in the file's metadata). VGG16 comes from the cache
shared with LPIPS.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..image.ranges import to_tensor
from .backbone_cache import verified_backbone
from .full_reference import check_pair

_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Convolutions by N of torchvision's `features.N`; each stage's last output is compared, then pooled."""
_CHANNELS = (3, 64, 128, 256, 512, 512)
"""Channels of what is compared: the picture itself, then the stages."""
_EPSILON = 1e-6
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dists(nn.Module):
    """DISTS between two image batches: frozen, in the float32 of its weights."""

    alpha: Tensor
    """Weights of texture, (1475,) over all channels compared; with `beta` they sum to 1."""
    beta: Tensor
    """Weights of structure, likewise."""
    mean: Tensor
    std: Tensor
    pooling: Tensor

    def __init__(self, backbone: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """`backbone`: torchvision's VGG16 by `features.N.weight` and `.bias`; `weights`: alpha and beta."""
        super().__init__()
        self.convolutions = nn.ModuleDict()
        for layer in (layer for stage in _STAGES for layer in stage):
            weight, bias = (backbone[f"features.{layer}.{name}"] for name in ("weight", "bias"))
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, device="meta")
            convolution.load_state_dict({"weight": weight, "bias": bias}, assign=True)
            self.convolutions[str(layer)] = convolution
        total = weights["alpha"].sum() + weights["beta"].sum()
        self.register_buffer("alpha", weights["alpha"] / total)
        self.register_buffer("beta", weights["beta"] / total)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).reshape(3, 1, 1))
        hann = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("pooling", hann.outer(hann))
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """D = sum over channels of alpha (1 - l) + beta (1 - s), arXiv:2004.07728.

        l = (2 mu_a mu_b + c) / (mu_a^2 + mu_b^2 + c) compares a channel's global means, its texture;
        s = (2 cov_ab + c) / (var_a + var_b + c) its structure. Gradients reach both pictures.

        Args:
            a: NCHW RGB in [-1, 1].
            b: The same shape as `a`.

        Returns:
            float32 of shape (N,): 0 for equal images, about 0.1 to 0.4 for visibly different ones.
        """
        distance = torch.zeros(len(a), device=a.device)
        offset = 0
        for x, y in zip(self._features(a), self._features(b), strict=True):
            channels = slice(offset, offset + x.shape[1])
            texture, structure = _similarities(x, y)
            distance = distance + ((1 - texture) * self.alpha[channels]).sum(dim=1)
            distance = distance + ((1 - structure) * self.beta[channels]).sum(dim=1)
            offset = channels.stop
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        """The picture in [0, 1], and the last activation of each stage of VGG16."""
        with torch.autocast(images.device.type, enabled=False):
            picture = (images.to(self.mean.dtype) + 1) / 2
            h = (picture - self.mean) / self.std
            found = [picture]
            for stage in _STAGES:
                if stage != _STAGES[0]:
                    h = self._pool(h)
                for layer in stage:
                    h = F.relu(self.convolutions[str(layer)](h))
                found.append(h)
        return found

    def _pool(self, h: Tensor) -> Tensor:
        """L2 pooling by two, sqrt(g * h^2) with a Hann window g, in place of VGG's max: it does not alias."""
        channels = h.shape[1]
        window = self.pooling.expand(channels, 1, 3, 3)
        return torch.sqrt(F.conv2d(h**2, window, stride=2, padding=1, groups=channels) + 1e-12)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, like `Lpips`; nothing here depends on the mode."""
        return super().train(False)


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(texture, structure) of every channel, each (N, C), of features (N, C, h, w)."""
    mean_x, mean_y = (h.mean(dim=(2, 3), keepdim=True) for h in (x, y))
    texture = (2 * mean_x * mean_y + _EPSILON) / (mean_x**2 + mean_y**2 + _EPSILON)
    x, y = x - mean_x, y - mean_y
    covariance, var_x, var_y = ((u * v).mean(dim=(2, 3)) for u, v in ((x, y), (x, x), (y, y)))
    return texture.flatten(1), (2 * covariance + _EPSILON) / (var_x + var_y + _EPSILON)


def load_dists() -> Dists:
    """DISTS with VGG16 from the cache, on the CPU.

    Raises:
        UserError: The backbone is not in the cache, or its file is damaged.
    """
    weights = Path(__file__).with_name("dists_weights.safetensors")
    return Dists(load_file(verified_backbone("vgg")), load_file(weights))


def dists(sr_u8: np.ndarray, hr_u8: np.ndarray, net: Dists) -> float:
    """DISTS on RGB, uncropped and at the pictures' own size; 0 for equal images, larger for different ones.

    Args:
        sr_u8: uint8 HWC RGB.
        hr_u8: The same shape as `sr_u8`.
        net: `load_dists()`, on any device.

    Raises:
        ValueError: The images are of other kinds or of unequal shapes.
    """
    check_pair(sr_u8, hr_u8)
    with torch.inference_mode():
        device = net.alpha.device
        return net(to_tensor(sr_u8[None]).to(device), to_tensor(hr_u8[None]).to(device)).item()
