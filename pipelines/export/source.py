"""What is exported: the network, the settings it needs elsewhere, and pictures to compare formats on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctmsr.config import from_dict, to_dict
from ctmsr.errors import UserError
from ctmsr.model.checkpoint import Manifest
from ctmsr.model.inference import InferenceConfig
from ctmsr.model.network import ConsistencyModel
from ctmsr.model.noise import position_noise
from ctmsr.model.portable import PortableModel

TOLERANCE = 1e-4
"""Largest difference from torch at which an export is kept, in units of the [0, 1] range of pictures."""
_SIZES = ((1, 1), (2, 1), (1, 3), (3, 2))
"""Heights and widths of the pictures to compare on, as multiples of what the network needs."""

Compute = Callable[[Tensor, Tensor], Tensor]
"""Takes pictures and noise as `PortableModel.forward` does."""


@dataclass(frozen=True)
class Source:
    """A model to export."""

    name: str
    """As the user named it, for messages."""
    network: ConsistencyModel
    """In eval mode, on the CPU, in float32."""
    manifest: Manifest
    """Of its checkpoint."""
    licence: str
    """Of the weights."""

    @property
    def sigma_max(self) -> float:
        """The noise level that the network starts from."""
        return float(self.manifest.config["schedule"]["sigma_max"])

    @property
    def inference(self) -> InferenceConfig:
        """How a picture is upscaled with it."""
        return from_dict(InferenceConfig, self.manifest.config["inference"], "inference")

    @property
    def file_stem(self) -> str:
        """Name of an export without its suffix, such as `starter-x4`."""
        return f"{self.manifest.config.get('name', 'ctmsr')}-x{self.network.config.scale}"

    def portable(self) -> PortableModel:
        """The model that every format must agree with."""
        return PortableModel(
            self.network, sigma_max=self.sigma_max, colour_hold_px=self.inference.colour_hold_px
        )

    def settings(self) -> dict[str, Any]:
        """What a program needs besides the weights, as JSON types: `config.json` of a Hugging Face folder."""
        return {
            "network": to_dict(self.network.config),
            "sigma_max": self.sigma_max,
            "inference": to_dict(self.inference),
        }

    def metadata(self) -> dict[str, str]:
        """The same and the licence, as the flat texts that ONNX and safetensors files hold."""
        network, inference = self.network.config, self.inference
        return {
            "scale": str(network.scale),
            "padding_multiple": str(network.multiple),
            "sigma_max": str(self.sigma_max),
            "colour_hold_px": str(inference.colour_hold_px),
            "tile": str(inference.tile // network.multiple * network.multiple),
            "overlap": str(inference.overlap),
            "licence": self.licence,
            "settings": json.dumps(self.settings()),
        }


def samples(source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Random pictures of several sizes, (1, 3, h, w) in [0, 1], each with the noise of seed 0."""
    generator = torch.Generator().manual_seed(0)
    multiple, scale = source.network.config.multiple, source.network.config.scale
    for rows, columns in _SIZES:
        size = (1, 3, rows * multiple, columns * multiple)
        lq = torch.randint(0, 256, size, generator=generator) / 255
        yield lq, noise_of_seed(0, lq, scale, source.inference)


def noise_of_seed(seed: int, lq: Tensor, scale: int, inference: InferenceConfig) -> Tensor:
    """The noise that `upscale` draws for a picture, for each of several: (N, 3, scale·h, scale·w)."""
    count, _, height, width = lq.shape
    rows, columns = slice(0, scale * height), slice(0, scale * width)
    noise = position_noise(seed, rows, columns, lq.device, inference.noise_version)
    return noise.expand(count, -1, -1, -1)


@torch.inference_mode()
def check_agreement(source: Source, compute: Compute, what: str) -> float:
    """Compares an export with torch on pictures of several sizes; returns the largest difference.

    Raises:
        UserError: It is above TOLERANCE, or the results have another shape.
    """
    portable, largest = source.portable(), 0.0
    for lq, noise in samples(source):
        expected, found = portable(lq, noise), compute(lq, noise)
        same_shape = found.shape == expected.shape
        difference = (found - expected).abs().max().item() if same_shape else float("inf")
        if not difference <= TOLERANCE:  # true of NaN, too
            raise UserError(
                f"{what} of {source.name} gives another picture than torch for {lq.shape[3]}x{lq.shape[2]} "
                f"pixels: they differ by {difference:.2g}, and {TOLERANCE:g} is allowed. Nothing was kept. "
                "Update the packages of the extra `export`."
            )
        largest = max(largest, difference)
    return largest
