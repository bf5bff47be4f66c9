"""Host memory of a long stream: `python -m tests.benchmarks.memory`.

One epoch over 100 000 small pictures, from an S3 store through Ray Data's tasks to a Ray Train worker that
makes batches of them. The memory of each kind of process is read from /proc all the while: its own pages and
its share of shared ones, but not libraries, whose share depends on unrelated processes. The last line is
memory at the end over memory at 10 000 images.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from ctmsr.degradation.config import DegradationConfig
from pipelines.data.batches import make_batch
from pipelines.data.pictures import find_pictures
from pipelines.data.stream import StreamConfig, train_stream
from pipelines.infra.cluster import ray_cluster

from .store import bucket

BATCH, CROP, SCALE = 50, 32, 4
SIDE = 40
TELL_EVERY = 20
"""Batches."""


def consume(loop: Mapping[str, Any]) -> None:
    """The trainer: puts batches on the device, and does nothing with them."""
    shard, seen = ray.train.get_dataset_shard("train"), 0
    while seen < loop["total"]:
        for rows in shard.iter_batches(batch_size=BATCH, batch_format="numpy"):
            seen += len(make_batch(rows, global_batch_size=BATCH, num_workers=1).hr_u8)
            if seen % (TELL_EVERY * BATCH) == 0:
                loop["queue"].put(seen)


def processes(root: int) -> list[int]:
    """`root` and all its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
        except OSError:  # ended in the meantime
            continue
    found = [root]
    for parent in found:
        found += children[parent]
    return found


def memory_mb(root: int) -> dict[str, float]:
    """Memory of each kind of process, in MB."""
    held: dict[str, float] = defaultdict(float)
    for pid in processes(root):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        own_kb = sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        held[kind(pid == root, command)] += own_kb / 1e3
    return dict(held)


def kind(is_root: bool, command: str) -> str:
    """The kind of a process; empty for the store, whose memory holds the pictures."""
    if is_root:
        return "driver"
    if any(name in command for name in ("ceph-mon", "ceph-osd", "radosgw")):
        return "store"
    if "RayTrainWorker" in command:
        return "trainer"
    return "tasks and actors" if command.startswith("ray::") else "Ray's servers"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="default %(default)s")
    parser.add_argument("--from", type=int, default=10_000, dest="start", help="default %(default)s")
    arguments = parser.parse_args()
    samples: list[tuple[int, dict[str, float]]] = []
    with bucket(arguments.images, SIDE) as uri, ray_cluster(), tempfile.TemporaryDirectory() as folder:
        queue = Queue(actor_options={"num_cpus": 0})
        watcher = threading.Thread(target=watch, args=(queue, arguments.images, samples), daemon=True)
        watcher.start()
        stream = partial(
            train_stream,
            find_pictures(uri),
            hr_crop_size=CROP,
            scale=SCALE,
            degradation=DegradationConfig(),
            seed=0,
            skip=0,
            total=arguments.images,
            global_batch_size=BATCH,
        )
        datasets: dict[str, Any] = {"train": lambda: stream}
        trainer = TorchTrainer(
            consume,
            train_loop_config={"total": arguments.images, "queue": queue},
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(name="memory", storage_path=folder),
            datasets=datasets,
            dataset_config=StreamConfig(),
        )
        trainer.fit()
        watcher.join()
    report(samples, arguments.start, arguments.images)


def watch(queue: Queue, total: int, samples: list[tuple[int, dict[str, float]]]) -> None:
    """Memory at every number of images that the trainer reports."""
    started, seen = time.monotonic(), 0
    while seen < total:
        seen = queue.get()
        if queue.empty():
            samples.append((seen, memory_mb(os.getpid())))
        if seen % 10_000 == 0:
            held = sum(mb for name, mb in samples[-1][1].items() if name != "store")
            print(f"  {seen} images  {seen / (time.monotonic() - started):.0f}/s  {held:.0f} MB", flush=True)


def report(samples: list[tuple[int, dict[str, float]]], start: int, total: int) -> None:
    """Prints the medians around the two points, each over a tenth of the stream, and their ratio."""
    width = total // 20
    places = {"first": (start - width, start + width), "last": (total - 2 * width, total)}
    print(f"{'MB':20}{f'at {start}':>12}{f'at {total}':>12}")
    sums = {"first": 0.0, "last": 0.0}
    for name in sorted({name for _, held in samples for name in held} - {"store"}):
        medians = {
            place: statistics.median(held.get(name, 0.0) for seen, held in samples if low <= seen <= high)
            for place, (low, high) in places.items()
        }
        for place, mb in medians.items():
            sums[place] += mb
        print(f"{name:20}{medians['first']:>12.0f}{medians['last']:>12.0f}")
    print(f"{'all':20}{sums['first']:>12.0f}{sums['last']:>12.0f}")
    print(f"ratio {sums['last'] / sums['first']:.3f}")


if __name__ == "__main__":
    main()
