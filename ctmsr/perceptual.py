"""LPIPS, the perceptual distance of the losses (VGG) and of the reported metric (AlexNet).

Zhang et al. 2018 (arXiv:1801.03924), computed by the `lpips` package with version 0.1 of its linear layers.
The ImageNet backbones come from a local cache that `python -m pipelines.backbones` fills: nothing is
downloaded here.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import UserError

BackboneName = Literal["vgg", "alex"]

BACKBONE_SHA256: dict[BackboneName, str] = {
    "vgg": "cabd922aeb0dd6d56f2bed33221aee74b7f1e760ddd105c0e0891606cbab6d0d",
    "alex": "9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9",
}
"""Of the converted files: torchvision's `features.N.{weight,bias}`, float32 safetensors, no metadata."""


class Lpips(nn.Module):
    """LPIPS between two image batches: frozen, always in eval mode, always in float32."""

    distance: Any
    """`lpips.LPIPS`, which carries no types."""

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance per image; a batch that carries no gradient is not recorded for one.

        Args:
            a: NCHW RGB in [-1, 1], with sides of 32 pixels or more.
            b: The same shape as `a`.

        Returns:
            float32 of shape (N,), 0 for equal images, larger for less alike ones.
        """
        return self._between(self._features(a), self._features(b))

    def anchored(self, a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The same distance for many comparisons with `a`, whose features are computed once, here.

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
        """Unit vectors over channels at every position, of every layer compared."""
        from lpips import normalize_tensor  # not at the top: see `_define_missing_torchvision_ops`

        with torch.autocast(images.device.type, enabled=False):
            layers = self.distance.net(self.distance.scaling_layer(images.float()))
            return [normalize_tensor(layer) for layer in layers]

    def _between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The forward of `lpips.LPIPS`, from its features on: its own computes those of `a` for every `b`."""
        with torch.autocast(a[0].device.type, enabled=False):
            parts = [
                linear((x - y) ** 2).mean(dim=(2, 3))
                for linear, x, y in zip(self.distance.lins, a, b, strict=True)
            ]
        return sum(parts[1:], start=parts[0]).flatten()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, so that a parent's `train()` does not wake the dropout in the linear layers."""
        return super().train(False)


def load_lpips(net: BackboneName) -> Lpips:
    """LPIPS with its backbone from the cache, on the CPU.

    Args:
        net: "vgg" for training losses, "alex" for the metric that the field reports.

    Raises:
        UserError: The backbone is not in the cache, or its file is damaged.
    """
    backbone = _read_backbone(net)
    _define_missing_torchvision_ops()
    import lpips

    # On the meta device nothing is drawn from the caller's random state, and nothing is held for the
    # classifier that torchvision builds and lpips drops.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")
        distance = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    linear = torch.load(
        Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True
    )
    distance.load_state_dict(linear, strict=False, assign=True)
    # lpips cuts the backbone into slices: `slice2.5.weight` is torchvision's `features.5.weight`.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in distance.net.state_dict()}
    distance.net.load_state_dict({name: backbone[source] for name, source in names.items()}, assign=True)
    return Lpips(distance)


def backbone_path(net: BackboneName) -> Path:
    """Where the converted backbone lies, whether or not it is there yet.

    The cache is `$CTMSR_CACHE`, else `$XDG_CACHE_HOME/ctmsr`, else `~/.cache/ctmsr`.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = os.environ.get("CTMSR_CACHE") or Path(caches) / "ctmsr"
    return Path(cache) / "lpips" / f"{net}.safetensors"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_backbone(net: BackboneName) -> dict[str, Tensor]:
    path = backbone_path(net)
    remedy = "Run `python -m pipelines.backbones` to fetch it."
    if not path.is_file():
        raise UserError(f"The LPIPS backbone {path} is missing. {remedy}")
    found = sha256_file(path)
    if found != BACKBONE_SHA256[net]:
        raise UserError(
            f"The LPIPS backbone {path} is damaged: sha256 {found}, not {BACKBONE_SHA256[net]}. {remedy}"
        )
    return load_file(path)


def _define_missing_torchvision_ops() -> None:
    """Let `import torchvision` work where its compiled operators do not match the installed torch.

    torchvision describes `nms` and `qnms` to torch without asking whether its extension was loaded, and fails
    where it was not: a CUDA build of torchvision beside a CPU build of torch. No backbone uses them. So: load
    the extension as torchvision does, and only where that fails, declare the two.
    """
    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("torchvision is not installed. Run `pip install -r requirements.txt`.")
    try:
        torch.ops.load_library(Path(spec.submodule_search_locations[0]) / "_C.so")
    except OSError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", schema)
