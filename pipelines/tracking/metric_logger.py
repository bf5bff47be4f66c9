"""Writes metrics and pictures of a run to MLflow in the background, and outlasts any outage of the server."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from .runs import connect, first_line

_RETRY_EVERY_S = 2
_STEPS_AT_ONCE = 40
"""MLflow accepts at most 1000 points per request."""
_FINAL_ERRORS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}
"""Errors that a retry cannot fix."""


@dataclass(frozen=True)
class _Write:
    """One pending write: the points of a step, or a picture."""

    what: str
    points: tuple[Metric, ...] = ()
    image: Callable[[], object] | None = None


class MetricLogger:
    """Writes metrics and pictures of one run in a background thread: a call returns at once.

    Writes keep their order. While the server is down, the thread retries for as long as the run lasts and
    holds pending writes in memory; `unsent` returns those that a checkpoint should keep.
    """

    def __init__(self, tracking_uri: str, run_id: str, unsent: Sequence[Mapping[str, Any]] = ()) -> None:
        """`unsent` are the points that an earlier logger of this run did not get to write."""
        self._client = connect(tracking_uri)
        self._run_id = run_id
        self._waiting: deque[_Write] = deque()  # the first is being written
        self._changed = threading.Condition()
        self._is_closed = False
        self._lost: list[str] = []
        for known in unsent:
            self._submit(_points(known["metrics"], known["step"], known["timestamp"]))
        # Not an executor: at exit the interpreter would wait for its thread, minutes if the server is down.
        self._thread = threading.Thread(target=self._write_all, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues one point per metric, with the current time."""
        self._submit(_points(metrics, step, int(time.time() * 1000)))

    def image(self, image_u8: np.ndarray, key: str, step: int) -> None:
        """Queues a uint8 HWC picture; MLflow shows the pictures of one key with a slider over the steps."""
        write = partial(self._client.log_image, self._run_id, image_u8, key=key, step=step)
        self._submit(_Write(f"picture {key} of step {step}", image=write))

    def unsent(self) -> list[dict[str, Any]]:
        """Points not yet written, as JSON types; pictures are not included."""
        with self._changed:
            waiting = [write.points for write in self._waiting if write.points]
        return [
            {
                "step": points[0].step,
                "timestamp": points[0].timestamp,
                "metrics": {point.key: point.value for point in points},
            }
            for points in waiting
        ]

    def close(self, timeout_s: float = 60) -> list[str]:
        """Waits until everything is written, for at most `timeout_s`.

        Returns:
            The calls to `log` or `image` that were lost, each with the reason.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            return [*self._lost, *(f"{write.what}: not written in time" for write in self._waiting)]

    def _submit(self, write: _Write) -> None:
        with self._changed:
            self._waiting.append(write)
            self._changed.notify_all()

    def _write_all(self) -> None:
        while writes := self._next():
            error = self._write(writes)
            if error is not None and error.error_code not in _FINAL_ERRORS:
                with self._changed:
                    self._changed.wait_for(lambda: False, _RETRY_EVERY_S)
                continue
            with self._changed:
                for write in writes:
                    self._waiting.popleft()
                    if error is not None:
                        self._lost.append(f"{write.what}: {first_line(error)}")

    def _next(self) -> list[_Write]:
        """The next writes: one picture, or the points of many steps; empty once closed and all written."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            points = list(itertools.takewhile(lambda write: write.points, self._waiting))
            return points[:_STEPS_AT_ONCE] or list(itertools.islice(self._waiting, 1))

    def _write(self, writes: list[_Write]) -> MlflowException | None:
        try:
            if writes[0].image:
                writes[0].image()
            else:
                points = [point for write in writes for point in write.points]
                self._client.log_batch(self._run_id, points)
        except MlflowException as error:
            return error
        except (SQLAlchemyError, OSError) as error:
            return MlflowException(first_line(error))
        return None


def _points(metrics: Mapping[str, float], step: int, timestamp: int) -> _Write:
    points = (Metric(name, float(value), timestamp, step) for name, value in metrics.items())
    return _Write(f"metrics of step {step}", tuple(points))
