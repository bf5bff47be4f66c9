"""A safetensors file for programs that load models with spandrel, and the architecture that reads it.

A program that uses spandrel learns to load such files by two lines:

    from pipelines.export.spandrel_file import CtmsrArchitecture
    spandrel.MAIN_REGISTRY.add(spandrel.ArchSupport.from_architecture(CtmsrArchitecture()))

spandrel hands an architecture the tensors of a file, not its metadata. So the settings are in both: as text
in the metadata, for people and other programs, and as the bytes of a tensor.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchSupport,
    ImageModelDescriptor,
    ModelLoader,
    SizeRequirements,
    StateDict,
)

from ctmsr.config import from_dict
from ctmsr.model.inference import InferenceConfig
from ctmsr.model.network import ConsistencyModel, NetworkConfig
from ctmsr.model.portable import PortableModel

from .source import Compute, Source, check_agreement, noise_of_seed

SETTINGS = "ctmsr_settings"
"""The tensor with the settings: uint8, JSON in UTF-8."""


class CtmsrArchitecture(Architecture[ConsistencyModel]):
    """How spandrel recognises and loads the files that `write` makes."""

    def __init__(self) -> None:
        super().__init__(id="CTMSR", detect=lambda tensors: SETTINGS in tensors)

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[ConsistencyModel]:
        """The model. spandrel gives it a picture and nothing else, so its noise is always that of seed 0."""
        settings = json.loads(bytes(state_dict[SETTINGS].cpu().tolist()))
        network = ConsistencyModel(from_dict(NetworkConfig, settings["network"], "network")).eval()
        inference = from_dict(InferenceConfig, settings["inference"], "inference")
        portable = PortableModel(
            network, sigma_max=settings["sigma_max"], colour_hold_px=inference.colour_hold_px
        )
        return ImageModelDescriptor(
            network,
            {name: tensor for name, tensor in state_dict.items() if name != SETTINGS},
            architecture=self,
            purpose="SR",
            tags=[f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M"],
            supports_half=False,
            supports_bfloat16=True,
            scale=network.config.scale,
            input_channels=3,
            output_channels=3,
            size_requirements=SizeRequirements(multiple_of=network.config.multiple),
            call_fn=lambda _, lq: portable(lq, noise_of_seed(0, lq, network.config.scale, inference)),
        )


def write(source: Source, path: Path) -> float:
    """Writes the file and compares it, in spandrel, with torch; returns the largest difference.

    Raises:
        UserError: They do not agree.
    """
    settings = torch.frombuffer(bytearray(json.dumps(source.settings()).encode()), dtype=torch.uint8)
    tensors = {name: tensor.contiguous() for name, tensor in source.network.state_dict().items()}
    save_file({SETTINGS: settings, **tensors}, path, {"format": "pt", **source.metadata()})
    return check_agreement(source, in_spandrel(path), "the file for spandrel")


def in_spandrel(path: Path) -> Compute:
    """The file as a function of pictures, which ignores the noise that it is given: it has its own."""
    registry = MAIN_REGISTRY.copy()
    registry.add(ArchSupport.from_architecture(CtmsrArchitecture()))
    model = ModelLoader(registry=registry).load_from_file(path)
    return lambda lq, _: model(lq)
