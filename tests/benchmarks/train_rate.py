"""Step rates of Ray Train, torchrun and one process alone: `python -m tests.benchmarks.train_rate`.

Variants of the same loop take turns: one and two processes of torchrun on a machine without Ray, then two of
torchrun and two Ray Train workers while a Ray cluster runs there. The loop makes training steps of the
`small` preset on pictures in memory. Every process has the preset's per-worker batch, one thread and a core
of its own; rank 0 measures the time between two barriers. The Ray Train variant makes one `report` at the end
of the timed steps; the preset makes one every 120 steps.

The table ends with three ratios of medians over the rounds. `efficiency`: images/s of two processes over
twice those of one, which exchanges no gradients and has the machine to itself. `servers`: steps/s of torchrun
beside a cluster's servers over those without them. `ratio`: steps/s of Ray Train over torchrun's, both beside
a cluster.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import ray.train.torch
import torch
import torch.distributed
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ctmsr.degradation.recipe import degrade
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.model.network import ConsistencyModel
from ctmsr.training.objective import Batch
from ctmsr.training.state import build_state
from ctmsr.training.step import train_step
from pipelines.config.presets import small
from pipelines.config.run_config import RunConfig
from pipelines.infra.cluster import ray_cluster

from .degradation import crops

NUM_BATCHES = 8
"""Different batches that a process holds in memory."""


@dataclass(frozen=True)
class Form:
    """A variant of the loop."""

    name: str
    num_workers: int
    run: Callable[[], float]
    """Returns steps/s."""


def loop(
    parallelize: Callable[[nn.Module], nn.Module], report: Callable[[], None], num_warm: int, num_timed: int
) -> float:
    """The loop that every process runs in every variant; returns steps/s.

    Args:
        parallelize: Wraps the network in DDP.
        report: Called once, after the last timed step.
        num_warm: Untimed steps before.
        num_timed: Timed steps.
    """
    rank = torch.distributed.get_rank()
    pin(sorted(os.sched_getaffinity(0))[rank])
    config = small()
    torch.manual_seed(0)
    network = ConsistencyModel(config.network)
    state = build_state(network, config.optim, parallelize(network))
    lpips = load_lpips("vgg")
    stream = batches(config, rank)
    for batch in islice(stream, num_warm):
        train_step(state, batch, config.recipe, lpips)
    torch.distributed.barrier()
    started = time.perf_counter()
    for batch in islice(stream, num_timed):
        train_step(state, batch, config.recipe, lpips)
    report()
    torch.distributed.barrier()
    return num_timed / (time.perf_counter() - started)


def pin(core: int) -> None:
    """Pins this process to a core: its present threads, such as gloo's and Ray's, and later ones."""
    torch.set_num_threads(1)
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), [core])


def batch_size(config: RunConfig) -> int:
    """Images per update on one process, in every variant."""
    return config.train.global_batch_size // config.train.num_workers


def batches(config: RunConfig, rank: int) -> Iterator[Batch]:
    """A process's part of some batches, repeated endlessly: crops degraded as in the preset."""
    size = batch_size(config)
    num = NUM_BATCHES * size
    samples = range(rank * num, (rank + 1) * num)
    hr_u8 = crops(samples.stop, config.network.hr_size)[samples.start :]
    rng = np.random.default_rng(rank)
    scale, recipe = config.network.scale, config.degradation
    lq_u8 = np.stack([degrade(hr, scale=scale, config=recipe, rng=rng) for hr in hr_u8])
    return cycle(
        [
            Batch(
                hr_u8=torch.tensor(hr_u8[first : first + size]),
                lq_u8=torch.tensor(lq_u8[first : first + size]),
                samples=list(samples[first : first + size]),
                keys=["photo"] * size,
            )
            for first in range(0, num, size)
        ]
    )


def torchrun_process(num_warm: int, num_timed: int) -> None:
    """Runs in a process of torchrun; rank 0 prints its steps/s."""
    torch.distributed.init_process_group("gloo")

    def parallelize(network: nn.Module) -> nn.Module:
        alone = torch.distributed.get_world_size() == 1
        return network if alone else DistributedDataParallel(network, broadcast_buffers=False)

    rate = loop(parallelize, lambda: None, num_warm, num_timed)
    if torch.distributed.get_rank() == 0:
        print(rate)
    torch.distributed.destroy_process_group()


def ray_worker(steps: Mapping[str, int]) -> float:
    """Runs in a worker of Ray Train."""
    parallelize = partial(
        ray.train.torch.prepare_model, parallel_strategy_kwargs={"broadcast_buffers": False}
    )
    return loop(parallelize, lambda: ray.train.report({"step": steps["num_timed"]}), **steps)


def torchrun(num_workers: int, num_warm: int, num_timed: int) -> float:
    """Steps/s of processes that torchrun starts."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    program = ["-m", "tests.benchmarks.train_rate", "--loop", f"--warm-up={num_warm}", f"--steps={num_timed}"]
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as Ray does
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def ray_train(num_workers: int, num_warm: int, num_timed: int) -> float:
    """Steps/s of Ray Train workers, started as `pipelines.train` does."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            ray_worker,  # type: ignore[arg-type]
            train_loop_config={"num_warm": num_warm, "num_timed": num_timed},
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers, resources_per_worker={"CPU": small().train.cpus_per_worker}
            ),
            run_config=ray.train.RunConfig(name="train_rate", storage_path=folder),
        )
        return trainer.fit().return_value  # type: ignore[attr-defined]


def measure(alone: list[Form], beside_ray: list[Form], num_rounds: int) -> dict[str, list[float]]:
    """Steps/s of every variant in every round; every other round goes through them in reverse."""
    rates: dict[str, list[float]] = {form.name: [] for form in alone + beside_ray}

    def take_turns(forms: list[Form]) -> None:
        for form in forms:
            rates[form.name].append(form.run())
            print(f"  {form.name}: {rates[form.name][-1]:.3f}", flush=True)

    for number in range(num_rounds):
        order = -1 if number % 2 else 1
        take_turns(alone[::order])
        with ray_cluster():
            take_turns(beside_ray[::order])
    return rates


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps timed per round; default %(default)s")
    parser.add_argument(
        "--warm-up", type=int, default=8, help="untimed steps before them; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--loop", action="store_true", help="run as a process of torchrun; for internal use")
    arguments = parser.parse_args()
    steps = {"num_warm": arguments.warm_up, "num_timed": arguments.steps}
    if arguments.loop:
        return torchrun_process(**steps)
    os.environ.pop("RAY_ADDRESS", None)  # a private cluster
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2:
        parser.error("two processes with a core each need two cores, and this process may use one.")
    one = Form("torchrun, 1 process", 1, partial(torchrun, 1, **steps))
    two = Form("torchrun, 2 processes", 2, partial(torchrun, 2, **steps))
    two_beside = Form("the same, Ray running", 2, partial(torchrun, 2, **steps))
    two_of_ray = Form("Ray Train, 2 workers", 2, partial(ray_train, 2, **steps))
    rates = measure([one, two], [two_beside, two_of_ray], arguments.rounds)
    size = batch_size(small())
    print(f"{num_cores} cores, torch {torch.__version__}, Ray {ray.__version__}, batch {size} a process")
    print(f"{'':24}{'steps/s':>9}{'min':>8}{'max':>8}{'images/s':>10}")
    images = {}
    for form in (one, two, two_beside, two_of_ray):
        values = rates[form.name]
        median = statistics.median(values)
        images[form] = median * size * form.num_workers
        print(f"{form.name:24}{median:>9.3f}{min(values):>8.3f}{max(values):>8.3f}{images[form]:>10.2f}")
    print(f"efficiency {images[two] / (2 * images[one]):.2f}")
    print(f"servers {images[two_beside] / images[two]:.2f}")
    print(f"ratio {images[two_of_ray] / images[two_beside]:.2f}")


if __name__ == "__main__":
    main()
