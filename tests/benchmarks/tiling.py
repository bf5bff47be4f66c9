"""Tiled inference: are the tile borders visible, and what does a large picture cost? See `--help`.

Needs no Ray. Given a checkpoint, it tiles a 512x512 LR photograph in three ways, compares the results, and
compares the gradient across tile borders with that of the untiled picture. Then it upscales a picture to 8
megapixels.
"""

import argparse
import itertools
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage.data
import torch

from ctmsr.config import from_dict
from ctmsr.model import checkpoint
from ctmsr.model.inference import InferenceConfig, tile_spans, upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.config.presets import PRESETS

CUTS = ((256, 64), (192, 64), (320, 96))
"""Tile and overlap, in LQ pixels."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.tiling")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="folder of a trained model; without it, only the large picture is measured",
    )
    parser.add_argument("--preset", default="published", choices=list(PRESETS), help="without a checkpoint")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.checkpoint:
        model, manifest = checkpoint.load_model(arguments.checkpoint, device)
        sigma_max = manifest.config["schedule"]["sigma_max"]
        inference = from_dict(InferenceConfig, manifest.config.get("inference", {}))
        compare_cuts(model, sigma_max, inference)
    else:
        preset = PRESETS[arguments.preset]()
        model, sigma_max, inference = (
            ConsistencyModel(preset.network),
            preset.schedule.sigma_max,
            preset.inference,
        )
        model.eval().to(device)
    large_picture(model, sigma_max, inference)


def compare_cuts(model: ConsistencyModel, sigma_max: float, inference: InferenceConfig) -> None:
    """Prints how much differently tiled pictures differ, and whether tile borders change the gradient."""
    lq_u8 = skimage.data.astronaut()
    side, scale = len(lq_u8), model.config.scale

    def cut(tile: int, overlap: int) -> np.ndarray:
        config = replace(inference, tile=tile, overlap=overlap)
        return upscale(model, lq_u8, sigma_max=sigma_max, config=config).astype(np.float32)

    whole = cut(side, 0)
    pictures = {way: cut(*way) for way in CUTS}
    for one, other in itertools.combinations(CUTS, 2):
        distance = np.abs(pictures[one] - pictures[other]).mean()
        print(f"tile, overlap {one} and {other}: mean difference {distance:.2f} of 255")
    for (tile, overlap), picture in pictures.items():
        spans = tile_spans(side, tile=tile, overlap=overlap, multiple=model.config.multiple)
        borders = sorted({scale * place for span in spans for place in span if 0 < place < side})
        others = [place for place in range(scale, scale * side, scale) if place not in borders]
        at_borders, elsewhere = (
            gradient(picture, places) / gradient(whole, places) for places in (borders, others)
        )
        print(
            f"tile, overlap {(tile, overlap)}: gradient across borders, in that of the uncut picture, "
            f"{at_borders / elsewhere:.3f} of elsewhere"
        )


def gradient(picture: np.ndarray, places: list[int]) -> float:
    """Mean absolute difference to the previous row or column at `places`."""
    places_before = np.array(places) - 1
    rows = np.abs(picture[places] - picture[places_before]).mean()
    columns = np.abs(picture[:, places] - picture[:, places_before]).mean()
    return float(rows + columns)


def large_picture(model: ConsistencyModel, sigma_max: float, inference: InferenceConfig) -> None:
    """Prints the time and memory for 8 megapixels of output."""
    scale = model.config.scale
    lq_u8 = np.random.default_rng(0).integers(0, 256, (2048 // scale, 4096 // scale, 3), np.uint8)
    started = time.perf_counter()
    sr_u8 = upscale(model, lq_u8, sigma_max=sigma_max, config=inference)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        print(f"GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    size = f"{sr_u8.shape[1]}x{sr_u8.shape[0]}"
    print(f"{millions:.1f} M parameters, {size}: {seconds:.0f} s, peak memory of the process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
