"""The progress line of a run, sent from rank 0 of the workers to the terminal that started it."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .invocation import printable

_PLAIN_INTERVAL_S = 10
"""Minimum time between lines if the output is not a terminal, where a line cannot be rewritten."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a run."""

    name: str
    phase: str
    step: int
    total_steps: int
    loss: float
    images_per_s: float
    """Over all workers."""
    data_wait: float
    """Fraction of the time that the trainer waited for data, 0 to 1."""
    data_mb_per_s: float
    """Read from storage, over all workers."""
    eta_s: float
    num_workers: int

    def __str__(self) -> str:
        return (
            f"{self.name}  {self.phase} step {self.step}/{self.total_steps}  loss {self.loss:.3f}  "
            f"{self.images_per_s:.1f} images/s on {self.num_workers}  data {self.data_mb_per_s:.1f} MB/s, "
            f"wait {self.data_wait:.0%}  ETA {duration(self.eta_s)}"
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:d}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def progress_line() -> Iterator[Queue]:
    """A queue whose latest Progress is shown while the `with` block runs; strings stay on the screen."""
    # On the driver's node: if another node held the queue, losing that node would end the run.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    done = threading.Event()
    printer = threading.Thread(target=_show, args=(queue, done), daemon=True)
    printer.start()
    try:
        yield queue
    finally:
        done.set()
        printer.join()
        queue.shutdown(force=True)


def _show(queue: Queue, done: threading.Event) -> None:
    rewrite, shown_at, shown = sys.stdout.isatty(), 0.0, False
    while not done.is_set():
        try:
            progress = queue.get(timeout=0.5)
        except Empty:
            continue
        if isinstance(progress, str):
            print(("\r\033[K" if shown else "") + printable(progress), flush=True)
        elif rewrite:
            print(f"\r\033[K{progress}", end="", flush=True)
            shown = True
        elif time.monotonic() - shown_at > _PLAIN_INTERVAL_S or progress.step == progress.total_steps:
            print(progress, flush=True)
            shown_at = time.monotonic()
    if shown:
        print()
