"""How many images/s one Ray Data executor can hand out: `python -m tests.benchmarks.executor`.

The stream's blocks pass through Ray Data with tasks that do nothing, to as many consumers as `--workers`, on
this machine. In a training, planner, executor and split coordinator are one process, and on a large cluster
the tasks run elsewhere; so its CPU time per block is what limits the stream. The table ends with the images/s
that it leaves room for, over those of 64 GPUs at 250 images/s.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.data import DataIterator

from pipelines.data.pictures import find_pictures
from pipelines.data.sample_order import SampleOrder
from pipelines.infra.cluster import ray_cluster
from pipelines.infra.ray_data import configured

from .memory import processes
from .scale import write_index

GPUS, IMAGES_PER_GPU = 64, 250
BATCH_PER_WORKER = 32
WARM_BLOCKS = 40
"""Per consumer."""


@ray.remote(num_cpus=0)
class Consumer:
    """Takes blocks and does nothing with them."""

    def consume(self, shard: DataIterator, num_blocks: int) -> tuple[float, float, int]:
        """When the timed part began and ended, and its number of rows."""
        seen, started, rows = 0, 0.0, 0
        while seen < WARM_BLOCKS + num_blocks:
            for batch in shard.iter_batches(batch_size=None):  # type: ignore[arg-type]  # whole blocks
                seen += 1
                if seen == WARM_BLOCKS:
                    started = time.time()
                elif WARM_BLOCKS < seen <= WARM_BLOCKS + num_blocks:
                    rows += len(batch["sample"])
        return started, time.time(), rows


def same(rows: dict[str, Any]) -> dict[str, Any]:
    """The trivial map."""
    return rows


def coordinator_s(root: int) -> float:
    """CPU time of the split coordinator so far, in seconds."""
    for pid in processes(root):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended in the meantime
            continue
        if name.startswith(b"ray::SplitCoordinator"):
            return (int(fields[11]) + int(fields[12])) / 100
    return 0.0


def measure(uri: str, num_workers: int, num_blocks: int) -> tuple[float, float, float]:
    """Blocks/s on this machine, rows of a block, and the coordinator's CPU time per block in ms."""
    order = SampleOrder(find_pictures(uri), 0, 0, 10**9, BATCH_PER_WORKER * num_workers, num_workers)
    blocks = ray.data.read_datasource(order, override_num_blocks=len(order.get_read_tasks(1)))
    stream = configured(blocks.map_batches(same, batch_size=None))
    shards = stream.streaming_split(num_workers, equal=True)
    consumers = [Consumer.remote() for _ in range(num_workers)]  # type: ignore[attr-defined]
    running = [
        consumer.consume.remote(shard, num_blocks) for consumer, shard in zip(consumers, shards, strict=True)
    ]
    readings = []
    while len(ray.wait(running, num_returns=num_workers, timeout=0.5)[0]) < num_workers:
        readings.append((time.time(), coordinator_s(os.getpid())))
    spans = ray.get(running)
    begin, end = max(span[0] for span in spans), min(span[1] for span in spans)
    total = num_blocks * num_workers
    inside = [(at, used) for at, used in readings if begin <= at <= end]
    used = (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
    rate = total / (end - begin)
    return rate, sum(span[2] for span in spans) / total, 1000 * used / rate


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16], help="default %(default)s")
    parser.add_argument("--blocks", type=int, default=200, help="per worker; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    arguments = parser.parse_args()
    names = ("workers", "blocks/s", "rows/block", "coordinator, ms/block", "images/s at most")
    print("".join(f"{name:>23}" for name in names))
    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        uri = write_index(Path(folder, "x.index"), 10**6)
        for workers in arguments.workers:
            found = [measure(uri, workers, arguments.blocks) for _ in range(arguments.rounds)]
            rate, rows, cpu_ms = (statistics.median(values) for values in zip(*found, strict=True))
            most = 1000 / cpu_ms * rows
            print(f"{workers:>23}{rate:>23.1f}{rows:>23.0f}{cpu_ms:>23.2f}{most:>23.0f}", flush=True)
    print(f"ratio {most / (GPUS * IMAGES_PER_GPU):.2f}")


if __name__ == "__main__":
    main()
