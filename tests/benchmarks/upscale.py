"""Speed of `pipelines.upscale` over many pictures: `python -m tests.benchmarks.upscale`.

The bare loop has decoded pictures in memory, only calls the registered model, and uses all cores. The second
variant also decodes and encodes, as any loop over files must. The third is the command's own code on Ray
Data, from a folder of JPEG files to a folder of PNG files, on the same cores. They take turns; the start of
Ray and of its workers is not counted. The network is the `small` preset's, untrained. The table ends with the
ratio of medians over the rounds: upscale to the bare loop.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch

from ctmsr.config import to_dict
from ctmsr.image import decode, read
from ctmsr.image.encoding import encode
from ctmsr.image.enlarging import enlarge
from ctmsr.model import checkpoint
from ctmsr.model.network import ConsistencyModel
from pipelines.config.presets import PRESETS
from pipelines.infra.cluster import ray_cluster
from pipelines.register.run import register
from pipelines.tracking.models import Version, find_version
from pipelines.tracking.released import Upscale
from pipelines.tracking.runs import preflight
from pipelines.upscale.on_ray import upscale_many
from pipelines.upscale.run import find_pictures
from pipelines.upscale.upscaler import Settings

from .store import photo

WARM = 20
"""Untimed pictures of each variant."""


def released(folder: Path) -> Version:
    """A registered model."""
    config = PRESETS["small"]()
    torch.manual_seed(0)
    checkpoint.save(
        folder / "checkpoint",
        model=ConsistencyModel(config.network).state_dict(),
        config=to_dict(config),
        meta={},
    )
    uri = preflight(f"sqlite:///{folder}/mlflow.db")
    register(folder / "checkpoint", tracking_uri=uri, model_name="bench", run_id=None, metrics={}, tags={})
    return find_version(uri, "models:/bench/1")


def loop(model: Upscale, pictures: list[np.ndarray]) -> float:
    """Images/s of the model alone."""
    return timed([partial(model, lq_u8, 0) for lq_u8 in pictures])


def loop_over_files(model: Upscale, files: list[Path], out: Path) -> float:
    """Images/s with decoding before and encoding after."""
    out.mkdir(exist_ok=True)

    def make(file: Path) -> None:
        lq = read(file.read_bytes(), name=file.name)
        sr = enlarge(lq, lambda rgb: model(rgb, 0))
        (out / f"{file.stem}.png").write_bytes(encode(sr))

    return timed([partial(make, file) for file in files])


def timed(calls: list[Callable[[], object]]) -> float:
    """Calls per second, after the untimed ones."""
    for call in calls[:WARM]:
        call()
    started = time.perf_counter()
    for call in calls[WARM:]:
        call()
    return (len(calls) - WARM) / (time.perf_counter() - started)


def upscaled(photos: Path, version: Version, scratch: Path) -> float:
    """Images/s of the command's code, into a new folder."""
    out = tempfile.mkdtemp(dir=scratch)
    pictures = find_pictures([str(photos)], out)
    started, number = 0.0, 0
    for number, outcome in enumerate(upscale_many(pictures, Settings(version, 0, out)), 1):
        assert not outcome.problem
        if number == WARM:
            started = time.perf_counter()
    return (number - WARM) / (time.perf_counter() - started)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=200, help="default %(default)s")
    parser.add_argument("--side", type=int, default=96, help="side of a photo in pixels; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        scratch, photos = Path(folder), Path(folder, "photos")
        photos.mkdir()
        files = [photos / f"{number:06d}.jpg" for number in range(arguments.photos)]
        for number, file in enumerate(files):
            file.write_bytes(photo(number, arguments.side))
        version = released(scratch)
        model, pictures = version.load(), [decode(file.read_bytes(), name=file.name) for file in files]
        torch.set_num_threads(cores)
        rates = measure(
            {
                "bare loop": partial(loop, model, pictures),
                "loop over files": partial(loop_over_files, model, files, scratch / "loop"),
                "upscale": partial(upscaled, photos, version, scratch),
            },
            arguments.rounds,
        )
    print(
        f"{cores} cores, torch {torch.__version__}, ray {ray.__version__}; {arguments.photos} JPEG files, "
        f"{arguments.side}x{arguments.side}"
    )
    print(f"{'':18}{'images/s':>10}{'min':>8}{'max':>8}")
    for name, values in rates.items():
        print(f"{name:18}{statistics.median(values):>10.2f}{min(values):>8.2f}{max(values):>8.2f}")
    print(f"ratio {statistics.median(rates['upscale']) / statistics.median(rates['bare loop']):.2f}")


def measure(forms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Images/s of every variant in every round."""
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            rates[name].append(form())
            print(f"  {name} {rates[name][-1]:.2f}", flush=True)
    return rates


if __name__ == "__main__":
    main()
