"""The cache of ImageNet backbones for LPIPS and DISTS, filled by `python -m pipelines.backbones`.

Downloads nothing and does not import torch: that command only needs to know which file is where.
"""

import hashlib
import os
from pathlib import Path
from typing import Literal

from ..errors import UserError

BackboneName = Literal["vgg", "alex"]

BACKBONE_SHA256: dict[BackboneName, str] = {
    "vgg": "cabd922aeb0dd6d56f2bed33221aee74b7f1e760ddd105c0e0891606cbab6d0d",
    "alex": "9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9",
}
"""SHA-256 of the converted files: torchvision's `features.N.{weight,bias}`, float32, without metadata."""


def cache_folder() -> Path:
    """`$CTMSR_CACHE`, else `$XDG_CACHE_HOME/ctmsr`, else `~/.cache/ctmsr`."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CTMSR_CACHE") or Path(caches) / "ctmsr")


def backbone_path(net: BackboneName) -> Path:
    """Where the converted backbone belongs in the cache, whether or not it is there yet."""
    return cache_folder() / "lpips" / f"{net}.safetensors"


def verified_backbone(net: BackboneName) -> Path:
    """The cached file of a backbone, checked against the known SHA-256.

    Raises:
        UserError: It is missing or damaged.
    """
    path = backbone_path(net)
    remedy = "Run `python -m pipelines.backbones` to fetch it."
    if not path.is_file():
        raise UserError(f"The LPIPS backbone {path} is missing. {remedy}")
    found = sha256_file(path)
    if found != BACKBONE_SHA256[net]:
        raise UserError(
            f"The LPIPS backbone {path} is damaged: sha256 {found}, not {BACKBONE_SHA256[net]}. {remedy}"
        )
    return path


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
