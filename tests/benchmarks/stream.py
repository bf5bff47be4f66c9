"""Speed of the stream from an S3 store to batches: `python -m tests.benchmarks.stream`.

Four ways to make the same samples take turns, with the same number of processes on the same cores: from
bytes already in memory, which leaves decoding, crop and degradation; with a torch DataLoader that fetches one
picture after the other, by this project's reader or by boto3; and with our stream. The store (Ceph, see
tests/support/servers/ceph.py) and the consumer share the last core. The table ends with ratios of medians
over the rounds: stream to each DataLoader, stream to memory.
"""

import argparse
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import boto3
import cv2
import numpy as np
import ray
import torch
from torch.utils.data import DataLoader, Dataset

from ctmsr.degradation.config import DegradationConfig
from ctmsr.degradation.recipe import degrade
from ctmsr.image import decode, random_crop
from ctmsr.rng import Order, sample_rng
from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.stream import train_stream
from pipelines.infra.storage import open_uri, read_bytes
from tests.support.keys import keys_of
from tests.support.repository import ROOT

from .store import bucket

BATCH = 16
CROP, SCALE, SEED = 256, 4, 0
CONFIG = DegradationConfig()


def sample(data: bytes, key: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The sample that a data task makes from a file."""
    hr_u8 = random_crop(decode(data, name=key), CROP, sample_rng(SEED, epoch, key, "crop"), name=key)
    return hr_u8, degrade(hr_u8, scale=SCALE, config=CONFIG, rng=sample_rng(SEED, epoch, key, "degrade"))


def pin(cores: list[int]) -> None:
    """Pins this process and those it starts to some cores, with one thread per picture."""
    os.sched_setaffinity(0, cores)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


@dataclass
class Bucket(Dataset):
    """A data set for a DataLoader: fetches as the stream does, decodes, crops and degrades."""

    uri: str
    keys: list[str]
    num_samples: int

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, position = divmod(number, len(self.keys))
        return sample(self.fetch(self.keys[position]), self.keys[position], epoch)

    def fetch(self, key: str) -> bytes:
        """A file, through a client of this process."""
        if not hasattr(self, "_place"):
            self._place = open_uri(self.uri)
        file_system, root = self._place
        return read_bytes(file_system, f"{root}/{key}")


class BucketOfBoto3(Bucket):
    """The same as it is usually written: with boto3."""

    def fetch(self, key: str) -> bytes:
        """A file, through a client of this process."""
        if not hasattr(self, "_client"):
            self._client = boto3.client("s3")
        name, _, _ = self.uri.removeprefix("s3://").partition("/")
        data: bytes = self._client.get_object(Bucket=name, Key=key)["Body"].read()
        return data


def rate(batches: Iterator[object], num_warm: int, num_timed: int) -> float:
    """Images/s of an iterator of batches, after the first `num_warm` images."""
    for _ in range(num_warm // BATCH):
        next(batches)
    started = time.perf_counter()
    for _ in range(num_timed // BATCH):
        next(batches)
    return num_timed / (time.perf_counter() - started)


def from_memory(files: dict[str, bytes], cores: list[int], num_timed: int) -> float:
    """Images/s of processes that have the bytes in memory."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit Ray's locks, some of them held
    with context.Pool(len(cores), _pin_one, (context.Value("i", 0), cores)) as pool:
        items = [(data, key, 0) for key, data in files.items()]
        some = [items[i % len(items)] for i in range(num_timed)]
        pool.map(_make, some[: 8 * len(cores)], chunksize=8)
        started = time.perf_counter()
        pool.map(_make, some, chunksize=len(some) // len(cores))
        seconds = time.perf_counter() - started
        pool.close()
        pool.join()
    return num_timed / seconds


def _pin_one(counter: "multiprocessing.sharedctypes.Synchronized[int]", cores: list[int]) -> None:
    with counter.get_lock():
        pin([cores[counter.value % len(cores)]])
        counter.value += 1


def _make(item: tuple[bytes, str, int]) -> None:
    sample(*item)  # not sent back, as in a process that feeds a trainer of its own


def from_loader(bucket: Bucket, cores: list[int], num_warm: int, num_timed: int) -> float:
    """Images/s of a DataLoader. Threads of the S3 client do not survive a fork."""
    loader = DataLoader(
        bucket,
        batch_size=BATCH,
        num_workers=len(cores),
        worker_init_fn=partial(_pin_worker, cores=cores),
        multiprocessing_context="spawn",
    )
    return rate(iter(loader), num_warm, num_timed)


def _pin_worker(number: int, cores: list[int]) -> None:
    pin([cores[number]])


def from_stream(pictures: Pictures, num_warm: int, num_timed: int, order: Order = "global") -> float:
    """Images/s of our stream."""
    stream = train_stream(
        pictures,
        hr_crop_size=CROP,
        scale=SCALE,
        degradation=CONFIG,
        seed=SEED,
        skip=0,
        total=num_warm + num_timed,
        global_batch_size=BATCH,
        num_workers=1,
        order=order,
    )
    return rate(iter(stream.iter_batches(batch_size=BATCH)), num_warm, num_timed)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=400, help="photos in the bucket; default %(default)s")
    parser.add_argument(
        "--side", type=int, default=384, help="side of a photo in pixels; default %(default)s"
    )
    parser.add_argument(
        "--images", type=int, default=4000, help="images timed per round; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    arguments = parser.parse_args()
    *cores, last = sorted(os.sched_getaffinity(0))
    pin([last])
    num_warm, num_timed = 480, arguments.images
    with bucket(arguments.photos, arguments.side) as uri:
        pictures = find_pictures(uri)
        keys = keys_of(pictures)
        file_system, root = open_uri(uri)
        files = {key: read_bytes(file_system, f"{root}/{key}") for key in keys}
        loader = partial(from_loader, cores=cores, num_warm=num_warm, num_timed=num_timed)
        forms: dict[str, Callable[[], float]] = {
            "bytes in memory": partial(from_memory, files, cores, num_timed),
            "DataLoader": partial(loader, Bucket(uri, keys, num_warm + num_timed)),
            "DataLoader, boto3": partial(loader, BucketOfBoto3(uri, keys, num_warm + num_timed)),
            "stream": partial(from_stream, pictures, num_warm, num_timed),
        }
        start_ray(cores)
        rates = measure(forms, arguments.rounds)
        ray.shutdown()
    show(rates, cores, arguments.side, files)
    stream = statistics.median(rates["stream"])
    for name in ("DataLoader", "DataLoader, boto3"):
        print(f"ratio to {name} {stream / statistics.median(rates[name]):.2f}")
    print(f"ratio {stream / statistics.median(rates['bytes in memory']):.2f}")


def start_ray(cores: list[int]) -> None:
    """A cluster of one CPU for each of some cores, to which its processes are pinned."""
    os.environ["PYTHONPATH"] = str(ROOT)  # its processes import this module
    ray.init(
        address="local",
        num_cpus=len(cores),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": lambda: pin(cores)},
    )


def show(rates: dict[str, list[float]], cores: list[int], side: int, files: dict[str, bytes]) -> None:
    """Prints what was measured with which pictures."""
    size = sum(map(len, files.values())) / len(files)
    print(f"{len(cores)} process(es), a core each; JPEG {side}x{side}, {size / 1e3:.0f} KB")
    print(f"{'':18}{'images/s':>10}{'min':>8}{'max':>8}")
    for name, values in rates.items():
        print(f"{name:18}{statistics.median(values):>10.1f}{min(values):>8.1f}{max(values):>8.1f}")


def measure(forms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Images/s of every way in every round."""
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            rates[name].append(form())
            print(f"  {name} {rates[name][-1]:.1f}", flush=True)
    return rates


if __name__ == "__main__":
    main()
