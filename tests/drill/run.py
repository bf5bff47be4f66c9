"""A training under faults: follows it, injects faults, and restarts its command where that may end."""

import random
import time
from dataclasses import dataclass

import boto3
from mlflow import MlflowClient

from ctmsr.model.checkpoint import MANIFEST_FILE
from tests.drill.verify import unreadable_newest
from tests.drill.world import BUCKET, FAULTS, World
from tests.support.child import Child
from tests.support.training_command import Point, logged

DRIVER = "driver"
KINDS = (*FAULTS, DRIVER)
RECOVERY_S = 240
"""Longer than any recovery should take."""
_MAY_END_COMMAND = ("store", "disk")
"""Faults after which the command may give up with an error, to be restarted."""
_GRACE_S = 60


class DrillError(RuntimeError):
    """The training did not survive a fault as it should."""


@dataclass(frozen=True)
class Fault:
    """A fault and when it strikes."""

    number: int
    kind: str
    step: int
    """The step after which it strikes."""
    delay_s: float
    """Delay after that step: it may hit any moment of a step or of a checkpoint."""
    length_s: float
    """How long the fault lasts."""


class FaultedRun:
    """The training under faults."""

    def __init__(self, there: World, total_steps: int, seed: int) -> None:
        self._there, self._total_steps, self._draw = there, total_steps, random.Random(seed)
        # not through the server, which is down at times
        self._client = MlflowClient(f"sqlite:///{there.folder}/mlflow.db")
        self._store = boto3.client("s3")
        self._num_starts, self._forgiven_until = 0, 0.0
        self.recovered_s: list[float] = []
        self.unreadable: list[str] = []
        self._start()

    @property
    def run_uri(self) -> str:
        """The folder of its checkpoints."""
        return f"{BUCKET}/runs/faulted"

    def strike(self, fault: Fault) -> str:
        """Injects a fault and waits until training has recovered; returns a line of report.

        Raises:
            DrillError: It did not recover, or the command ended when it should not have.
        """
        self._wait_for_step(fault.step)
        time.sleep(fault.delay_s)
        if self.command.status() == 0:
            raise DrillError("the training finished before all faults had struck; it is too fast.")
        step, num_starts, struck_s = self._step(), self._num_starts, time.time()
        if fault.kind == DRIVER:
            self.command.kill()
            self._start()
        else:
            FAULTS[fault.kind](self._there, self._draw, fault.length_s)
        if fault.kind in _MAY_END_COMMAND:
            self._forgiven_until = time.monotonic() + _GRACE_S
        points = self._points_until_saved(time.time())
        self.recovered_s.append(longest_pause_s(points, struck_s))
        self.unreadable += unreadable_newest(self.run_uri)
        num_started = self._num_starts - num_starts
        started = f", command started {num_started} times" if num_started else ""
        took = f"new steps after {self.recovered_s[-1]:5.1f} s"
        return f"{fault.number:3d}  {fault.kind:7s} at step {step:4d}, {took}{started}"

    def finish(self) -> None:
        """Waits for the run to finish."""
        deadline = time.monotonic() + RECOVERY_S + self._total_steps
        while self.command.status() != 0:
            self._tend(deadline)

    def _start(self) -> None:
        self._num_starts += 1
        self.command: Child = self._there.train("faulted", self._total_steps, self._num_starts)

    def _wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + RECOVERY_S
        while self._step() < step:
            self._tend(deadline)

    def _points_until_saved(self, mended_s: float) -> list[Point]:
        """The losses in MLflow, once there is a checkpoint of a step done after `mended_s`."""
        deadline = time.monotonic() + RECOVERY_S
        while True:
            points, saved = self._points(), self._saved()
            if any(point.time_s > mended_s and saved.get(point.step) for point in points):
                return points
            self._tend(deadline)

    def _tend(self, deadline: float) -> None:
        """Waits a moment, and restarts a command that has ended where it may."""
        status = self.command.status()
        if status == 0:
            raise DrillError("the training is over, but MLflow lacks some of its steps.")
        if status is not None:
            if time.monotonic() > self._forgiven_until:
                raise DrillError(f"the command ended with {status}. {self.command.log_tail()}")
            self._start()
        if time.monotonic() > deadline:
            raise DrillError(f"the training is stuck at step {self._step()}. {self.command.log_tail()}")
        time.sleep(0.25)

    def _step(self) -> int:
        """The last step known to MLflow or in a checkpoint."""
        return max([0, *self._saved(), *(point.step for point in self._points())])

    def _saved(self) -> dict[int, bool]:
        """Whether the checkpoint of each step, once begun, is complete."""
        bucket, _, prefix = f"{self.run_uri}/checkpoint_".removeprefix("s3://").partition("/")
        pages = self._store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        saved: dict[int, bool] = {}
        for key in keys:
            step = int(key.removeprefix(prefix).partition("-")[0])
            saved[step] = saved.get(step, False) or key.endswith(MANIFEST_FILE)
        return saved

    def _points(self) -> list[Point]:
        return logged(self._client, "faulted")


def longest_pause_s(points: list[Point], struck_s: float) -> float:
    """The longest time after `struck_s` without a new step, in seconds.

    Looks beyond the first new step: a full disk shows only when the next checkpoint is written.
    """
    pauses, last_step, last_s = [0.0], 0, 0.0
    for point in points:
        if point.step > last_step:
            pauses.append(point.time_s - max(last_s, struck_s))
            last_step, last_s = point.step, point.time_s
    return max(pauses)
