"""The model as other programs call it: one function of a picture and noise, without tiles or padding."""

import torch
from torch import Tensor, nn

from ..image.ranges import upsample
from .inference import low_pass
from .network import ConsistencyModel


class PortableModel(nn.Module):
    """`upscale` for a picture that is a single tile, as a module whose inputs and outputs are in [0, 1].

    Noise is an input. Then a picture depends on no program's generator: the same noise gives the same picture
    wherever the model runs, and a program that cuts a picture into tiles can give each its part of one noise.
    `position_noise` makes the noise that a seed stands for here.
    """

    def __init__(self, model: ConsistencyModel, *, sigma_max: float, colour_hold_px: float = 0.0) -> None:
        super().__init__()
        self.model = model.eval()
        self.sigma_max, self.colour_hold_px = sigma_max, colour_hold_px

    def forward(self, lq: Tensor, noise: Tensor) -> Tensor:
        """f(lq_up + sigma_max · noise, sigma_max, lq), arXiv:2503.20349.

        Args:
            lq: (N, 3, h, w) in [0, 1], read as 8-bit pictures; h and w multiples of `model.config.multiple`.
            noise: Standard normal, (N, 3, scale·h, scale·w).

        Returns:
            (N, 3, scale·h, scale·w) in [0, 1], of the type of `lq`.
        """
        scale = self.model.config.scale
        levels = (lq.float() * 255).round().clamp(0, 255)  # the very numbers of a picture file
        signed = levels / 127.5 - 1
        lq_up = upsample(signed, scale)
        sigma = torch.full((1,), self.sigma_max, device=lq.device)
        sr = self.model(lq_up + self.sigma_max * noise.float(), sigma, signed)
        if self.colour_hold_px:
            sr = sr + low_pass(lq_up - sr, scale * self.colour_hold_px)
        return ((sr + 1) / 2).clamp(0, 1).to(lq.dtype)
