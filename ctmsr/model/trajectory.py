"""The PF-ODE trajectory from the noisy LR to the HR image, and the scalings of the consistency function."""

import torch
from torch import Tensor

SIGMA_DATA = 0.5
SIGMA_SCALE = 0.1  # the paper divides sigma by this in c_skip and c_out


def trajectory_point(x_0: Tensor, y_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x_0 + alpha_t (y_0 - x_0) + sigma_t noise (arXiv:2503.20349, the trajectory).

    Args:
        x_0: HR images, float (N, 3, H, W) in [-1, 1].
        y_0: Upscaled LR images `lq_up`, same shape and range.
        noise: Standard normal, same shape.
        alpha: Residual weight, a scalar or (N,).
        sigma: Noise level, a scalar or (N,).
    """
    alpha, sigma = expand(alpha, x_0), expand(sigma, x_0)
    return x_0 + alpha * (y_0 - x_0) + sigma * noise


def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_noise) of f = c_skip x + c_out F(x, c_noise, y); at sigma = 0, f(x) = x exactly."""
    scaled = sigma / SIGMA_SCALE
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / torch.sqrt(scaled**2 + SIGMA_DATA**2)
    return c_skip, c_out, torch.log(sigma + 0.002) / 4


def expand(value: Tensor, like: Tensor) -> Tensor:
    """A scalar or (N,) tensor as (N or 1, 1, 1, 1), ready to scale images `like`."""
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
