"""Curves of a soak: what is held early and at the end, and what has grown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Self

from tests.support.training_command import BATCH

ALLOWED = 1.03


@dataclass(frozen=True)
class Held:
    """What processes hold."""

    memory_mb: float = 0.0
    """Of their own, without what they share with others."""
    files: int = 0
    threads: int = 0
    processes: int = 0

    def __add__(self, other: Self) -> "Held":
        return Held(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Sample:
    """What everything holds at one moment."""

    minute: float
    held: Mapping[str, Held]
    """By kind of process."""
    shared_mb: float
    """Memory that processes share: the object stores."""
    stored: int
    """Objects in the bucket."""
    step: int
    rows: int
    """Of metrics in MLflow's database, so far."""
    requests: int
    """To the object store, so far."""

    def line(self) -> str:
        """For people who watch the soak."""
        parts = [f"{kind} {held.memory_mb:.0f} MB" for kind, held in sorted(self.held.items())]
        return f"step {self.step}  {', '.join(parts)}"


@dataclass(frozen=True)
class Curve:
    """A quantity early and at the end."""

    early: float
    late: float

    @property
    def ratio(self) -> float:
        """The end to the beginning; 1 where there was nothing and is nothing."""
        if self.early == 0:
            return 1.0 if self.late == 0 else float("inf")
        return self.late / self.early


def curves(samples: Sequence[Sample], settled_min: float) -> dict[str, Curve]:
    """Curves by name: medians of levels, and counters for each 1 000 training samples.

    Args:
        samples: In order of time, at least 2 * settled_min long.
        settled_min: The early window begins here. Both windows are as long, or a quarter of the rest.
    """
    end = samples[-1].minute
    width = min(settled_min, (end - settled_min) / 4)
    early = [sample for sample in samples if settled_min <= sample.minute <= settled_min + width]
    late = [sample for sample in samples if sample.minute >= end - width]

    def level(value: Callable[[Sample], float]) -> Curve:
        return Curve(*(statistics.median(map(value, part)) for part in (early, late)))

    def rate(counter: Callable[[Sample], int]) -> Curve:
        return Curve(*(_per_thousand(part, counter) for part in (early, late)))

    found: dict[str, Curve] = {}
    for kind in sorted({kind for sample in (*early, *late) for kind in sample.held}):
        for what in ("memory_mb", "files", "threads", "processes"):
            found[f"{kind}: {what.replace('_mb', ', MB')}"] = level(partial(_held, kind, what))
    found["object stores, MB"] = level(lambda sample: sample.shared_mb)
    found["objects in the bucket"] = level(lambda sample: sample.stored)
    found["rows in MLflow per 1 000 samples"] = rate(lambda sample: sample.rows)
    found["requests to S3 per 1 000 samples"] = rate(lambda sample: sample.requests)
    return found


def _held(kind: str, what: str, sample: Sample) -> float:
    return float(getattr(sample.held.get(kind, Held()), what))


def _per_thousand(part: Sequence[Sample], counter: Callable[[Sample], int]) -> float:
    samples = BATCH * (part[-1].step - part[0].step)
    if samples == 0:
        raise ValueError(f"no step from minute {part[0].minute:.0f} to {part[-1].minute:.0f}")
    return 1000 * (counter(part[-1]) - counter(part[0])) / samples


def grown(found: Mapping[str, Curve]) -> list[str]:
    """Names of the curves that have grown by more than is allowed."""
    return [name for name, curve in found.items() if curve.ratio > ALLOWED]


def table(found: Mapping[str, Curve]) -> str:
    """For people."""
    lines = [
        f"{name:36}{curve.early:10.1f}{curve.late:10.1f}{curve.ratio:8.3f}" for name, curve in found.items()
    ]
    return "\n".join([f"{'':36}{'early':>10}{'late':>10}{'ratio':>8}", *lines])
