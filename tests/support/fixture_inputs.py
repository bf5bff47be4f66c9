"""The inputs and weights that tests/fixtures/README.md describes, generated from names."""

import zlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ctmsr.model.network import NetworkConfig

FULL = NetworkConfig()
TINY = replace(FULL, model_channels=32, embed_dim=32, num_heads=2, dropout=0.0)


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers, determined by `name`."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Fills every weight with values determined by its name, large enough for each to matter."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or name.endswith("resample_filter"):
            continue
        drawn = tensor(name, tuple(value.shape))
        if value.ndim > 1:
            value.copy_(drawn / np.sqrt(np.prod(value.shape[1:])))
        else:
            value.copy_(0.1 * drawn + (1 if name.endswith("weight") else 0))
