"""Packs what a machine without network access needs: `python -m tests.benchmarks.kit --help`.

The command packs photographs and LPIPS's weights into a folder of limited size. The backbones are converted
to float16, which changes LPIPS by less than a thousandth. Training photographs are re-encoded as JPEG
(4:4:4), at the best quality that fits; held-out ones are copied as they are. `install` makes `load_lpips` and
`load_dists` use a kit's weights in the calling process.
"""

import argparse
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import cv2
import torch
from safetensors.torch import load_file, save_file

from ctmsr.image import decode
from ctmsr.metrics import backbone_cache
from ctmsr.metrics.backbone_cache import BackboneName

from .local_feed import SUFFIXES

QUALITIES = range(95, 59, -1)
HELD_OUT = ("val", "test")


def install(kit: Path) -> None:
    """Makes this process compute LPIPS and DISTS with the kit's weights, and import its packages."""
    cache = Path(tempfile.mkdtemp(prefix="ctmsr-kit-"))
    os.environ["CTMSR_CACHE"] = str(cache)
    sys.path.append(str(kit / "packages"))
    for net in get_args(BackboneName):
        path = backbone_cache.backbone_path(net)
        path.parent.mkdir(exist_ok=True)
        halves = load_file(kit / "backbones" / f"{net}.safetensors")
        save_file({name: value.float() for name, value in halves.items()}, path)
        # We have just written this file ourselves; the known hash is that of another one.
        backbone_cache.BACKBONE_SHA256[net] = backbone_cache.sha256_file(path)


def pack(photos: Path, more: list[Path], into: Path, mib: float) -> int:
    """Writes a kit and returns the JPEG quality of its training photographs.

    Args:
        photos: A folder with train, val and test.
        more: Further folders of training photographs.
        into: The kit's folder; existing contents are deleted.
        mib: Largest size of the kit, in MiB.

    Raises:
        ValueError: It does not fit even at the lowest quality.
    """
    shutil.rmtree(into, ignore_errors=True)
    (into / "backbones").mkdir(parents=True)
    for net in get_args(BackboneName):
        tensors = load_file(backbone_cache.backbone_path(net))
        save_file(
            {name: value.to(torch.float16) for name, value in tensors.items()},
            into / "backbones" / f"{net}.safetensors",
        )
    package = find_spec("lpips")
    assert package is not None  # a requirement
    assert package.submodule_search_locations is not None
    for net in get_args(BackboneName):
        weights = Path("weights", "v0.1", f"{net}.pth")
        target = into / "packages" / "lpips" / weights
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(package.submodule_search_locations[0]) / weights, target)
    (into / "packages" / "lpips" / "__init__.py").write_text("")
    for name in HELD_OUT:
        shutil.copytree(photos / name, into / "photos" / name)
    for path in into.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    left = int(mib * 2**20) - sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    return _pack_training([photos / "train", *more], into / "photos" / "train", left)


def _pack_training(folders: list[Path], into: Path, num_bytes: int) -> int:
    """Writes the folders' pictures as JPEG, at the best quality that fits in total; returns the quality."""
    into.mkdir(parents=True)
    paths = [
        path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES
    ]
    pictures = [cv2.cvtColor(decode(path.read_bytes(), name=str(path)), cv2.COLOR_RGB2BGR) for path in paths]
    low, high = 0, len(QUALITIES)
    while low < high:  # the highest quality that fits
        middle = (low + high) // 2
        sizes = sum(len(_jpeg(picture, QUALITIES[middle])) for picture in pictures)
        low, high = (low, middle) if sizes <= num_bytes else (middle + 1, high)
    if low == len(QUALITIES):
        raise ValueError(f"{len(paths)} photographs do not fit into {num_bytes} bytes. Leave some out.")
    for number, picture in enumerate(pictures):
        (into / f"{number:05d}.jpg").write_bytes(_jpeg(picture, QUALITIES[low]))
    return QUALITIES[low]


def _jpeg(bgr: object, quality: int) -> bytes:
    settings = [
        *(cv2.IMWRITE_JPEG_QUALITY, quality),
        *(cv2.IMWRITE_JPEG_OPTIMIZE, 1),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ]
    return cv2.imencode(".jpg", bgr, settings)[1].tobytes()  # type: ignore[call-overload]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.kit")
    parser.add_argument("--photos", type=Path, required=True, help="a folder with train, val and test")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="further training photographs")
    parser.add_argument("--into", type=Path, required=True, help="the kit's folder; replaced")
    parser.add_argument("--mib", type=float, default=60, help="largest size; default %(default)s")
    arguments = parser.parse_args()
    quality = pack(arguments.photos, arguments.more, arguments.into, arguments.mib)
    sizes = [path.stat().st_size for path in arguments.into.rglob("*") if path.is_file()]
    print(f"{arguments.into}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB, JPEG quality {quality}")


if __name__ == "__main__":
    main()
