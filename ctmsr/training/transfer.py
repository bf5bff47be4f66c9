"""Starting one network from the weights of another of its family: another scale, depth or width of a part.

A weight goes to the weight of the same name and shape. The first convolution sees the picture, and scale²
pixels of x for each of its pixels: for another scale, the weights of these are resampled.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.network import ConsistencyModel, NetworkConfig


@dataclass(frozen=True)
class Transfer:
    """What becomes of the weights of a checkpoint, by parameter names."""

    loaded: dict[str, str]
    """Taken as they are: the network's name -> the checkpoint's, which differs if `lq_size` does."""
    resampled: dict[str, str]
    """Adapted to another scale, likewise."""
    anew: list[str]
    """Initialised anew: the checkpoint has none of this name and shape."""
    left: list[str]
    """Not used: the network has none of this name and shape."""
    share: float
    """Share of the network's weights that come from the checkpoint, by their number."""

    @property
    def is_whole(self) -> bool:
        """Whether both networks are the same."""
        return not (self.resampled or self.anew or self.left)

    def apply(self, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict `now`, with the weights of the state dict `before` that it can use."""
        result = dict(now)
        result |= {name: before[source] for name, source in self.loaded.items()}
        for name, source in self.resampled.items():
            result[name] = _resampled(before[source], now[name].shape[1])
        return result


def plan_transfer(before: ConsistencyModel, now: ConsistencyModel) -> Transfer:
    """Finds out what `now` can take from `before`; both may be on the device "meta"."""
    theirs = {_by_level(before.config, name): name for name, _ in before.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in before.named_parameters()}
    parameters = dict(now.named_parameters())
    side = now.config.lq_size
    loaded, resampled, anew = {}, {}, []
    for name, parameter in parameters.items():
        source = theirs.get(_by_level(now.config, name))
        shape = shapes[source] if source else torch.Size()
        if source and shape == parameter.shape:
            loaded[name] = source
        elif source and name == f"model.enc.{side}x{side}_conv.weight" and shape[0] == parameter.shape[0]:
            resampled[name] = source
        else:
            anew.append(name)
    used = {*loaded.values(), *resampled.values()}
    size = {name: parameter.numel() for name, parameter in parameters.items()}
    share = sum(size[name] for name in (*loaded, *resampled)) / sum(size.values())
    return Transfer(loaded, resampled, anew, [name for name in shapes if name not in used], share)


def _by_level(config: NetworkConfig, name: str) -> str:
    """A parameter's name with the number of its level instead of its side, which depends on `lq_size`."""
    return re.sub(r"\b(\d+)x\1_", lambda side: f"level{config.lq_size // int(side[1])}_", name)


def _resampled(weight: Tensor, in_channels: int) -> Tensor:
    """The first convolution for another scale: (C, 3·scale² + 3, k, k) to (C, in_channels, k, k).

    Each group of scale² weights is averaged over areas and scaled to its old sum. So the result for an x of
    the new scale is the old one for that x enlarged by repeating pixels, where the ratio is whole.
    """
    old, new = (math.isqrt((channels - 3) // 3) for channels in (weight.shape[1], in_channels))
    of_x = weight[:, :-3].unflatten(1, (3, old, old)).movedim((2, 3), (-2, -1))  # (C, 3, k, k, old, old)
    areas = F.adaptive_avg_pool2d(of_x.flatten(0, -3)[:, None], new) * (old / new) ** 2
    of_x = areas.reshape(*of_x.shape[:-2], new, new).movedim((-2, -1), (2, 3))
    return torch.cat([of_x.flatten(1, 3), weight[:, -3:]], dim=1)
