"""Speed of the degradation on one core, against a plain one: `python -m tests.benchmarks.degradation`.

Both degrade the same crops of photographs, in turn. The results are medians over rounds of several batches,
as one batch may cost several times as much as another. The plain implementation is `plain_degradation`, in
batches like the authors' code; ours takes one image at a time, as a data task does.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import skimage.data
import torch

from ctmsr.degradation import ops as degradation_ops
from ctmsr.degradation import recipe as degradation
from ctmsr.degradation.config import DegradationConfig
from ctmsr.degradation.recipe import degrade

from .plain_degradation import degrade_batch

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
BATCHES = 8
"""Per round."""
STEPS = ("blur", "resize", "add_gaussian_noise", "add_poisson_noise", "jpeg")


def crops(num: int, size: int) -> np.ndarray:
    """Crops of photographs, uint8 (num, size, size, 3)."""
    draw, found = np.random.default_rng(0), []
    for i in range(num):
        photo = getattr(skimage.data, PHOTOS[i % len(PHOTOS)])()
        top, left = (int(draw.integers(side - size + 1)) for side in photo.shape[:2])
        found.append(photo[top : top + size, left : left + size])
    return np.stack(found)


def ours(hr_u8: np.ndarray, scale: int, config: DegradationConfig, rng: np.random.Generator) -> np.ndarray:
    """Degrades a batch with our implementation."""
    return np.stack([degrade(image, scale=scale, config=config, rng=rng) for image in hr_u8])


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds taken, and the result."""
    started = time.perf_counter()
    lq = run()
    return time.perf_counter() - started, lq


def stages(hr_u8: np.ndarray, scale: int, config: DegradationConfig) -> dict[str, float]:
    """Milliseconds per image that ours spends in each operation; the rest is in "all"."""
    spent = dict.fromkeys((*STEPS, "_draw_kernel"), 0.0)

    def watch(name: str, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def watched(*args: object, **kwargs: object) -> np.ndarray:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        return watched

    places = {name: degradation_ops if name in STEPS else degradation for name in spent}
    before = {name: getattr(place, name) for name, place in places.items()}
    try:
        for name, place in places.items():
            setattr(place, name, watch(name, before[name]))
        rng = np.random.default_rng(0)
        whole, _ = timed(partial(ours, hr_u8, scale, config, rng))
    finally:
        for name, place in places.items():
            setattr(place, name, before[name])
    return {name: 1000 * seconds / len(hr_u8) for name, seconds in (spent | {"all": whole}).items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="side of the HR crops; default %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="images per batch; default %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help=f"of {BATCHES} batches; default %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    config, scale = DegradationConfig(), 4
    hr_u8 = crops(arguments.batch, arguments.size)
    forms = {"plain": degrade_batch, "ours": ours}
    rngs = {name: np.random.default_rng(1) for name in forms}
    torch.manual_seed(0)
    times: dict[str, list[float]] = {name: [] for name in forms}
    results: dict[str, list[np.ndarray]] = {name: [] for name in forms}
    for number in range(-2, BATCHES * arguments.rounds):  # the first two batches are for warming up
        for name, form in forms.items():
            seconds, lq = timed(partial(form, hr_u8, scale, config, rngs[name]))
            if number >= 0:
                times[name].append(seconds)
                results[name].append(lq)
    rounds = {name: np.reshape(values, (-1, BATCHES)).sum(axis=1) for name, values in times.items()}
    rates = {name: BATCHES * arguments.batch / float(np.median(sums)) for name, sums in rounds.items()}
    print(f"{'one core':10}{'images/s':>10}{'mean of lq':>12}{'std of lq':>11}{'detail':>8}")
    for name in forms:
        lq = np.stack(results[name]).astype(np.float32)
        detail = np.abs(np.diff(lq, axis=3)).mean()  # of neighbours: noise and sharpness
        print(f"{name:10}{rates[name]:>10.1f}{lq.mean():>12.1f}{lq.std():>11.1f}{detail:>8.2f}")
    print(f"\n{'ours':20}{'ms an image':>12}")
    for name, spent_ms in stages(np.concatenate([hr_u8] * 5), scale, config).items():
        print(f"{name:20}{spent_ms:>12.2f}")
    print(f"ratio {rates['ours'] / rates['plain']:.2f}")


if __name__ == "__main__":
    main()
