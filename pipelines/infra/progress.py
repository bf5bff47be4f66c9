"""Progress of a command: live lines at the bottom of a terminal; elsewhere, plain lines now and then."""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .invocation import printable

if TYPE_CHECKING:  # takes seconds, and upscaling a picture needs none of it
    from ray.util.queue import Queue

_PLAIN_INTERVAL_S = 10
"""Minimum time between lines of one run if the output is not a terminal, where a line cannot be rewritten."""
_LEAST_BAR = 12
"""Width of the shortest bar, brackets included."""


@dataclass(frozen=True)
class Bar:
    """How far something has come, in one line."""

    label: str
    """What has come how far, such as `first  CT step 120/240`."""
    done: int
    total: int
    """0 if it is not known: there is no bar then."""
    facts: tuple[str, ...] = ()
    """Most important first: a narrow terminal shows as many as fit."""

    def __str__(self) -> str:
        return "  ".join([self.label, *self.facts])

    def fitted(self, width: int) -> str:
        """The line for a terminal of so many columns."""
        line = self.label
        room = width - 2 - (_LEAST_BAR if self.total else 0)
        shown = []
        for fact in self.facts:
            room -= len(fact) + 2
            if room < len(line):
                break
            shown.append(fact)
        facts = "".join(f"  {fact}" for fact in shown)
        length = min(40, width - len(line) - len(facts) - 4)
        if self.total and length > 2:
            filled = round(length * min(1.0, self.done / self.total))
            line += f"  [{'=' * filled:{length}}]"
        return (line + facts)[:width]


@dataclass(frozen=True)
class Progress:
    """A snapshot of a training run."""

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

    @property
    def bar(self) -> Bar:
        """It as a line."""
        is_over = self.step == self.total_steps
        last = ("scoring the last checkpoint",) if is_over else ()
        return Bar(
            f"{self.name}  {self.phase} step {self.step}/{self.total_steps}",
            self.step,
            self.total_steps,
            (
                *last,
                f"loss {self.loss:.3f}",
                f"{self.images_per_s:.1f} images/s",
                f"ETA {duration(self.eta_s)}",
                f"wait {self.data_wait:.0%}",
                f"data {self.data_mb_per_s:.1f} MB/s",
                counted(self.num_workers, "worker"),
            ),
        )


@dataclass(frozen=True)
class Scores:
    """Mean scores of a run on its held-out pictures, and those of bicubic as bicubic_*."""

    name: str
    step: int
    means: Mapping[str, float]

    def __str__(self) -> str:
        m = self.means
        return (
            f"{self.name}  step {self.step}  LPIPS {m['lpips']:.4f} (bicubic {m['bicubic_lpips']:.4f})  "
            f"PSNR-Y {m['psnr_y']:.2f} dB ({m['bicubic_psnr_y']:.2f})"
        )


@dataclass(frozen=True)
class Ended:
    """A run that shows no more progress."""

    name: str


def counted(number: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:d}:{minutes % 60:02d}:{rest:02d}"


class Screen:
    """The output of a command, for the duration of a `with` block. Threads may share it."""

    def __init__(self) -> None:
        self.is_live = sys.stdout.isatty()
        """Whether lines can be rewritten."""
        self._bars: dict[str, Bar] = {}
        self._told_at: dict[str, float] = {}
        self._num_lines = 0
        self._lock = threading.RLock()

    def __enter__(self) -> "Screen":
        for handler in logging.root.handlers:
            handler.addFilter(self._make_room)
        return self

    def __exit__(self, *_: object) -> None:
        self._redraw()
        for handler in logging.root.handlers:
            handler.removeFilter(self._make_room)

    def show(self, bar: Bar, name: str = "") -> None:
        """Shows a bar in place of the one that had this name; a full one stays on the screen."""
        with self._lock:
            if not self.is_live:
                now, is_full = time.monotonic(), bar.done == bar.total
                if is_full or now - self._told_at.get(name, 0) > _PLAIN_INTERVAL_S:
                    self._told_at[name] = now
                    print(bar, flush=True)
                return
            self._bars[name] = bar
            self._redraw()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        with self._lock:
            self.clear()
            print(printable(text), flush=True)
            self._redraw()

    def end(self, name: str = "") -> None:
        """Removes the bar of this name."""
        with self._lock:
            self._bars.pop(name, None)
            self._redraw()

    def clear(self) -> None:
        """Takes the bars off the screen until the next call, to make room for other output."""
        with self._lock:
            if self._num_lines:
                print(f"\033[{self._num_lines}A\033[J", end="", flush=True)
            self._num_lines = 0

    def _redraw(self) -> None:
        self.clear()
        if not self._bars:
            return
        width, height = shutil.get_terminal_size()
        lines = [bar.fitted(width - 1) for bar in self._bars.values()][: height - 2]
        print("\n".join(lines), flush=True)
        self._num_lines = len(lines)

    def _make_room(self, record: logging.LogRecord) -> bool:
        self.clear()
        return True


@contextmanager
def progress_line() -> Iterator["Queue"]:
    """A queue for Progress, Scores, Ended and text, from any process, to be shown during the `with` block."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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


def _show(queue: "Queue", done: threading.Event) -> None:
    from ray.util.queue import Empty

    with Screen() as screen:
        while not done.is_set() or not queue.empty():
            try:
                told = queue.get(timeout=0.5)
            except Empty:
                continue
            try:
                _tell(screen, told)
            except BrokenPipeError:
                return  # nobody reads any more, which the command finds at its next line


def _tell(screen: Screen, told: Any) -> None:
    if isinstance(told, Progress):
        screen.show(told.bar, told.name)
    elif isinstance(told, Ended):
        screen.end(told.name)
    else:
        screen.say(str(told))
