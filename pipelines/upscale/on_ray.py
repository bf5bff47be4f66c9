"""Many pictures upscaled through Ray Data, on workers that hold the model."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from ctmsr.errors import DataError, UserError

from ..infra.cluster import ray_cluster
from ..infra.exit_status import first_cause, root_cause
from ..infra.progress import duration
from ..infra.ray_data import configured
from .upscaler import Making, Outcome, Picture, Upscaler

_SHOW_EVERY_S = 10.0
_BLOCKS_PER_WORKER = 64
"""Enough that all workers end at about the same time; each costs Ray Data some milliseconds."""
_THREADS = 2
"""Pictures that a worker has in hand: while the model is at one, another is read, decoded or written."""
_THREADS_BESIDE_GPU = 4
_WORKER_BYTES = 4 << 30
"""Of a worker without a GPU: the published network and one of its tiles."""


def upscale_many(pictures: list[Picture], making: Making) -> Iterator[Outcome]:
    """Makes them, in order, with a line of progress now and then.

    A worker that dies is replaced, and its pictures are given to others.

    Raises:
        UserError: What stopped it. What is done stays done.
    """
    progress = _Progress(len(pictures))
    with ray_cluster():
        try:
            for row in _dataset(pictures, making).iter_rows():
                outcome = Outcome(**row)
                progress.add(outcome)
                yield outcome
        except ray.exceptions.RayError as error:
            cause = first_cause(error)
            said = str(cause) if isinstance(cause, UserError) else root_cause(error)
            raise DataError(f"it stopped; the same command continues it. {said}") from error


def _dataset(pictures: list[Picture], making: Making) -> ray.data.Dataset:
    num_workers, torch_threads, resources = _workers()
    threads = _THREADS_BESIDE_GPU if "num_gpus" in resources else _THREADS
    pool = ray.data.ActorPoolStrategy(
        size=min(num_workers, len(pictures)),
        # No block waits at a worker while another worker has nothing to do.
        max_tasks_in_flight_per_actor=threads,
        max_concurrent_calls_per_actor=threads,
        enable_true_multi_threading=True,
    )
    num_blocks = min(len(pictures), _BLOCKS_PER_WORKER * num_workers)
    rows = ray.data.from_items([asdict(picture) for picture in pictures], override_num_blocks=num_blocks)
    made = rows.map(
        Upscaler,  # type: ignore[arg-type] # a class will do, Ray Data's own hint does not say it
        fn_constructor_args=(making, torch_threads),
        compute=pool,
        **resources,
    )
    return configured(made)


def _workers() -> tuple[int, int, dict[str, Any]]:
    """How many workers the cluster holds, torch's threads in each, and what each asks Ray for."""
    total = {"CPU": 1.0} | ray.cluster_resources()  # none where the first worker is yet to be started
    if total.get("GPU", 0) >= 1:
        return int(total["GPU"]), 1, {"num_gpus": 1}
    # A private cluster has more CPUs than a small machine has cores.
    cpus_per_core = max(1.0, total["CPU"] / (os.cpu_count() or 1)) if len(ray.nodes()) == 1 else 1.0
    cores = max(1, int(total["CPU"] / cpus_per_core))
    num_workers = max(1, min(cores, int(total.get("memory", 0) / _WORKER_BYTES)))
    torch_threads = cores // num_workers
    return num_workers, torch_threads, {"num_cpus": int(torch_threads * cpus_per_core)}


class _Progress:
    """A line: how many there are, images/s since the first, and the time left."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen = self._made = self._bad = 0
        self._first = self._shown = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        now = time.monotonic()
        if not self._seen:
            self._first = now  # Ray and the workers have started
        self._seen += 1
        self._bad += bool(outcome.problem)
        self._made += not outcome.problem and not outcome.was_there
        if now - self._shown > _SHOW_EVERY_S or self._seen == self._total:
            self._shown = now
            print(self, flush=True)

    def __str__(self) -> str:
        there = self._seen - self._made - self._bad
        rate = max(0, self._made - 1) / max(self._shown - self._first, 1e-3)
        parts = [f"upscaled {self._made} of {self._total} pictures", f"{rate:.1f} images/s"]
        if rate and self._seen < self._total:
            parts.append(f"ETA {duration((self._total - self._seen) / rate)}")
        parts += [
            f"{number} {what}" for number, what in ((there, "done before"), (self._bad, "bad")) if number
        ]
        return "  ".join(parts)
