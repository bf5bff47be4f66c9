"""LPIPS, the perceptual distance in the losses (VGG) and in the reported metric (AlexNet).

Zhang et al. 2018 (arXiv:1801.03924), with version 0.1 of its linear layers, which is all that is used of the
`lpips` package. The ImageNet backbones come from a local cache: nothing is downloaded here.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from .backbone_cache import BackboneName, verified_backbone


class Lpips(nn.Module):
    """LPIPS between two image batches: frozen, always in eval mode.

    `.to(device, memory_format=torch.channels_last)` is its fastest layout on a GPU.
    """

    shift: Tensor
    scale: Tensor
    features: nn.Sequential
    """Numbered as in torchvision."""

    def __init__(self, tensors: Mapping[str, Tensor], precision: Literal["fp32", "bf16"] = "fp32") -> None:
        """Builds LPIPS from tensors in float32 or float16.

        Args:
            tensors: From `lpips_tensors`; they determine the backbone.
            precision: Precision of the backbone's convolutions; bf16 changes VGG's distance by less than
                0.5 %. The rest is float32.
        """
        super().__init__()
        with torch.device("meta"):  # so that the caller's random state is not used
            self.features, self.compared = _vgg16() if "features.28.weight" in tensors else _alexnet()
            self.lins = nn.ModuleList(
                nn.Conv2d(tensors[f"lins.{i}.weight"].shape[1], 1, 1, bias=False) for i in range(5)
            )
        self.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
        self.features.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        # From [-1, 1] to the statistics that the backbones were trained with.
        shift, scale = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
        self.register_buffer("shift", torch.tensor(shift)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(scale)[None, :, None, None])
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance per image.

        Args:
            a: NCHW RGB in [-1, 1], with sides of 32 pixels or more.
            b: The same shape as `a`.

        Returns:
            float32 of shape (N,), 0 for equal images, larger for more different ones.
        """
        return self._between(self._features(a), self._features(b))

    def anchored(self, a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The distance from `a`, whose features are computed only once, here.

        Args:
            a: As in `forward`; its gradient sums over the comparisons.

        Returns:
            A function of (`a` itself, b).
        """
        features = self._features(a)

        def from_a(x: Tensor, b: Tensor) -> Tensor:
            assert x is a, "anchored at another image"
            return self._between(features, self._features(b))

        return from_a

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit vectors over the channels at every position, for every layer compared."""
        with torch.autocast(images.device.type, enabled=False):
            h = ((images.float() - self.shift) / self.scale).to(next(self.features.parameters()).dtype)
            layers = []
            for number, layer in enumerate(self.features):
                h = layer(h)
                if number in self.compared:
                    layers.append(h)
            return [_unit(layer.float()) for layer in layers]

    def _between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        with torch.autocast(a[0].device.type, enabled=False):
            parts = [
                linear((x - y) ** 2).mean(dim=(2, 3)) for linear, x, y in zip(self.lins, a, b, strict=True)
            ]
        return sum(parts[1:], start=parts[0]).flatten()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever a parent's `train()` says."""
        return super().train(False)


def load_lpips(net: BackboneName, precision: Literal["fp32", "bf16"] = "fp32") -> Lpips:
    """LPIPS with its backbone from the cache, on the CPU.

    Args:
        net: "vgg" for training losses, "alex" for the metric that the field reports.
        precision: As in `Lpips`.

    Raises:
        UserError: The backbone is not in the cache or damaged, or the package is missing.
    """
    return Lpips(lpips_tensors(net), precision)


def lpips_tensors(net: BackboneName) -> dict[str, Tensor]:
    """All tensors of an `Lpips`, to take it to machines without the cache and the package.

    Returns:
        float32; stored as float16 they are half as large and still good for 3 digits.

    Raises:
        UserError: As `load_lpips`.
    """
    package = find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise UserError("The package lpips is not installed. Run `pip install lpips`.")
    weights = Path(package.submodule_search_locations[0]) / f"weights/v0.1/{net}.pth"
    linear = torch.load(weights, map_location="cpu", weights_only=True)
    tensors = {f"lins.{i}.weight": linear[f"lin{i}.model.1.weight"] for i in range(5)}
    return tensors | load_file(verified_backbone(net))


def _vgg16() -> tuple[nn.Sequential, set[int]]:
    """VGG-16 up to its last ReLU, and which layers are compared: the last ReLU before each pooling."""
    layers: list[nn.Module] = []
    compared = set()
    channels = 3
    for block in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in block:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        compared.add(len(layers) - 1)
    return nn.Sequential(*layers), compared


def _alexnet() -> tuple[nn.Sequential, set[int]]:
    """AlexNet up to its last ReLU, and which layers are compared: every ReLU."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)),
    ]
    return nn.Sequential(*layers), {i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)}


def _unit(layer: Tensor) -> Tensor:
    """Divides by the length over channels. The added constants are negligible beside a length in float32, and
    keep the gradient finite where all channels are 0."""
    return layer / (torch.sqrt(torch.sum(layer**2, dim=1, keepdim=True) + 1e-20) + 1e-10)
