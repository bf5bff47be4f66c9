"""Where the time of a data task goes: `python -m tests.benchmarks.task`.

CPU time of one core for a sample from a photograph of several sizes, by step, without fetching (see
tests.benchmarks.fetch); then for a sample where several crops share a picture.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import cv2
import skimage.data
from PIL import Image

from ctmsr.degradation.config import DegradationConfig
from ctmsr.degradation.recipe import degrade
from ctmsr.image import decode, random_crop
from ctmsr.rng import sample_rng

CROP, SCALE = 256, 4
CONFIG = DegradationConfig()


def photo(side: int) -> bytes:
    """A square JPEG file."""
    image = Image.fromarray(skimage.data.astronaut()).resize((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def steps(data: bytes, number: int, num_crops: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a task does for a picture, by name."""
    yield "decode", lambda: decode(data, name="photo")
    hr_u8 = decode(data, name="photo")
    for crop in range(num_crops):
        draw = sample_rng(0, number, "photo", f"crop {crop}")
        yield "crop", partial(random_crop, hr_u8, CROP, draw, name="photo")
        crop_u8 = random_crop(hr_u8, CROP, draw, name="photo")
        rng = sample_rng(0, number, "photo", f"degrade {crop}")
        yield "degrade", partial(degrade, crop_u8, scale=SCALE, config=CONFIG, rng=rng)


def measure(data: bytes, num_pictures: int, num_crops: int) -> dict[str, float]:
    """Milliseconds a sample, by step."""
    spent = dict.fromkeys(("decode", "crop", "degrade"), 0.0)
    for number in range(num_pictures):
        for name, step in steps(data, number, num_crops):
            started = time.thread_time()
            step()
            spent[name] += time.thread_time() - started
    return {name: 1e3 * seconds / (num_pictures * num_crops) for name, seconds in spent.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[384, 1024, 3000], help="default %(default)s")
    parser.add_argument("--crops", type=int, nargs="+", default=[1, 4], help="default %(default)s")
    parser.add_argument("--pictures", type=int, default=30, help="a round; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"{'ms of a core a sample':28}{'decode':>8}{'crop':>8}{'degrade':>9}{'sum':>8}{'min':>8}{'max':>8}")
    for side in arguments.sides:
        data = photo(side)
        for num_crops in arguments.crops:
            rounds = [measure(data, arguments.pictures, num_crops) for _ in range(arguments.rounds)]
            middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
            sums = sorted(sum(one.values()) for one in rounds)
            what = f"{side}x{side} px, {num_crops} crop(s)"
            print(
                f"{what:28}{middle['decode']:>8.2f}{middle['crop']:>8.2f}{middle['degrade']:>9.2f}"
                f"{statistics.median(sums):>8.2f}{sums[0]:>8.2f}{sums[-1]:>8.2f}"
            )


if __name__ == "__main__":
    main()
