"""Upscales many pictures with Ray Data, on workers that hold the model."""

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
from ..infra.progress import Bar, Screen, duration
from ..infra.ray_data import configured
from .upscaler import Outcome, Picture, Settings, Upscaler

_BLOCKS_PER_WORKER = 64
"""Enough that all workers finish at about the same time; each block costs Ray Data a few milliseconds."""
_THREADS = 2
"""Pictures in progress on a worker: while the model works on one, another is read, decoded or written."""
_THREADS_BESIDE_GPU = 4
_WORKER_BYTES = 4 << 30
"""Memory of a worker without a GPU: the published network and one of its tiles."""


def upscale_many(pictures: list[Picture], settings: Settings) -> Iterator[Outcome]:
    """Upscales the pictures, in order, and shows the progress.

    A worker that dies is replaced, and its pictures go to others.

    Raises:
        UserError: It stopped, and the message says why. Finished pictures stay in place.
    """
    progress = _Progress(len(pictures))
    with ray_cluster(), Screen() as screen:
        try:
            for row in _dataset(pictures, settings).iter_rows():
                outcome = Outcome(**row)
                progress.add(outcome)
                screen.show(progress.bar)
                if outcome.problem or outcome.warnings:
                    screen.clear()
                yield outcome
        except ray.exceptions.RayError as error:
            cause = first_cause(error)
            said = str(cause) if isinstance(cause, UserError) else root_cause(error)
            raise DataError(f"upscaling stopped; run the same command again to resume it. {said}") from error


def _dataset(pictures: list[Picture], settings: Settings) -> ray.data.Dataset:
    num_workers, torch_threads, resources = _workers(settings.model.device)
    threads = _THREADS_BESIDE_GPU if "num_gpus" in resources else _THREADS
    pool = ray.data.ActorPoolStrategy(
        size=min(num_workers, len(pictures)),
        # So that no block waits for one worker while another is idle.
        max_tasks_in_flight_per_actor=threads,
        max_concurrent_calls_per_actor=threads,
        enable_true_multi_threading=True,
    )
    num_blocks = min(len(pictures), _BLOCKS_PER_WORKER * num_workers)
    rows = ray.data.from_items([asdict(picture) for picture in pictures], override_num_blocks=num_blocks)
    made = rows.map(
        Upscaler,  # type: ignore[arg-type] # Ray Data accepts a class, though its type hint does not say so
        fn_constructor_args=(settings, torch_threads),
        compute=pool,
        **resources,
    )
    return configured(made)


def _workers(device: str | None) -> tuple[int, int, dict[str, Any]]:
    """How many workers fit on the cluster, torch's threads in each, and the resources each requests."""
    total = {
        "CPU": 1.0
    } | ray.cluster_resources()  # no CPU is listed before the first worker node has started
    if total.get("GPU", 0) >= 1 and device in (None, "cuda", "rocm"):
        return int(total["GPU"]), 1, {"num_gpus": 1}
    # On a small machine, a private cluster declares more CPUs than there are cores.
    cpus_per_core = max(1.0, total["CPU"] / (os.cpu_count() or 1)) if len(ray.nodes()) == 1 else 1.0
    cores = max(1, int(total["CPU"] / cpus_per_core))
    num_workers = max(1, min(cores, int(total.get("memory", 0) / _WORKER_BYTES)))
    torch_threads = cores // num_workers
    return num_workers, torch_threads, {"num_cpus": int(torch_threads * cpus_per_core)}


class _Progress:
    """The progress: how many pictures are done, images/s since the first, and the time left."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen = self._made = self._bad = 0
        self._first = self._last = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        now = time.monotonic()
        if not self._seen:
            self._first = now  # excludes the start of Ray and of the workers
        self._seen += 1
        self._bad += bool(outcome.problem)
        self._made += not outcome.problem and not outcome.existed
        self._last = now

    @property
    def bar(self) -> Bar:
        there = self._seen - self._made - self._bad
        rate = max(0, self._made - 1) / max(self._last - self._first, 1e-3)
        facts = [f"{rate:.1f} images/s"]
        if rate and self._seen < self._total:
            facts.append(f"ETA {duration((self._total - self._seen) / rate)}")
        facts += [
            f"{number} {what}" for number, what in ((there, "done before"), (self._bad, "bad")) if number
        ]
        label = f"upscaled {self._made} of {self._total} pictures"
        return Bar(label, self._seen, self._total, tuple(facts))
