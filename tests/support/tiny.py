"""A network, a perceptual distance, pictures and a recipe that are real but need only milliseconds."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctmsr.image.ranges import to_u8
from ctmsr.model.network import ConsistencyModel, NetworkConfig
from ctmsr.model.schedule import ScheduleConfig
from ctmsr.training.losses import LossConfig
from ctmsr.training.objective import Batch, Recipe
from ctmsr.training.state import OptimConfig
from tests.support.fixture_inputs import fill_weights, tensor

NETWORK = NetworkConfig(
    lq_size=8,
    model_channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    embed_dim=32,
    num_heads=2,
    window_size=4,
    dropout=0.0,
)
OPTIM = OptimConfig(ct_steps=2, dtm_steps=4, lr=1e-3, betas=(0.9, 0.99), dtm_refresh_steps=2)
RECIPE = Recipe(seed=0, optim=OPTIM, schedule=ScheduleConfig(), loss=LossConfig())


def filled_model(config: NetworkConfig = NETWORK) -> ConsistencyModel:
    """A network in which every weight matters; in a fresh one, blocks do next to nothing."""
    model = ConsistencyModel(config)
    fill_weights(model)
    return model


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of fixed, smooth features, (N,): like LPIPS, with one layer and no kinks."""
    filters = tensor("distance", (8, 3, 5, 5)) / 5
    difference = torch.tanh(F.conv2d(a, filters)) - torch.tanh(F.conv2d(b, filters))
    return difference.square().mean(dim=(1, 2, 3))


def make_batch(samples: list[int], lq_size: int = NETWORK.lq_size) -> Batch:
    """A smooth picture per sample, determined by its number, and the same at a quarter of the size."""
    coarse = torch.cat([tensor(f"picture{k}", (1, 3, 8, 8)) for k in samples])
    hr = F.interpolate(0.5 * coarse, size=(4 * lq_size, 4 * lq_size), mode="bicubic")
    hr_u8, lq_u8 = (torch.from_numpy(to_u8(images)) for images in (hr, F.avg_pool2d(hr, 4)))
    return Batch(hr_u8=hr_u8, lq_u8=lq_u8, samples=samples, keys=[f"picture{k}.png" for k in samples])


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    """All numbers of `tensors` as one vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors]).numpy()
