"""Reports on a training run from rank 0: progress line, MLflow, Ray's metrics."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray.train
from ray.util.metrics import Gauge
from ray.util.queue import Queue

from ctmsr.training.state import TrainState

from ..config.run_config import RunConfig
from ..data.batches import StreamMonitor
from ..infra.progress import Progress
from ..tracking.metric_logger import MetricLogger


class Gauges:
    """Ray's metrics `ctmsr_<name>` of a run; those with alerts are in cluster/kubernetes/monitoring."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Sets some of them."""
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"ctmsr_{name}", f"{name} of a training run", tag_keys=("run",))
            self._gauges[name].set(value, {"run": self._run})


class Reporter:
    """Measures a run on rank 0 and reports it."""

    def __init__(
        self, config: RunConfig, loop: Mapping[str, Any], monitor: StreamMonitor, unsent: list[dict[str, Any]]
    ) -> None:
        """`unsent` are metrics that had not reached MLflow when the checkpoint was written."""
        self._config = config
        self._monitor = monitor
        self._num_workers = ray.train.get_context().get_world_size()
        self._queue: Queue = loop["progress"]
        self._mlflow = MetricLogger(loop["tracking_uri"], loop["run_id"], unsent)
        self._gauges = Gauges(config.name)
        self._gauges.set({"step_at_s": time.time()})  # a run that never gets to a step has stalled, too
        self._restart_clock()

    def count(self, waited_s: float) -> None:
        """Counts a step and the seconds it waited for data."""
        self._num_steps += 1
        self._waited_s += waited_s

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """For what is not a step: its time counts in images_per_s, but not in step_images_per_s."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._between_s += time.monotonic() - started

    def report(self, state: TrainState, losses: Mapping[str, float], stored_at: float) -> None:
        """Reports the latest losses, and the speed since the last call.

        `stored_at` is when the newest checkpoint was complete, in seconds since the epoch.
        """
        elapsed_s = time.monotonic() - self._started
        step_s = elapsed_s / self._num_steps
        step, total = state.global_step, self._config.optim.total_steps
        speed = {
            "images_per_s": self._config.train.global_batch_size / step_s,
            "data_wait": self._waited_s / elapsed_s,
            "data_mb_per_s": self._monitor.file_bytes * self._num_workers / 1e6 / elapsed_s,
        }
        self._queue.put_nowait(
            Progress(
                name=self._config.name,
                phase="DTM" if "dtm_loss" in losses else "CT",
                step=step,
                total_steps=total,
                loss=losses["loss"],
                eta_s=(total - step) * step_s,
                num_workers=self._num_workers,
                **speed,
            )
        )
        lr = state.optimizer.param_groups[0]["lr"]
        alone = {"step_images_per_s": speed["images_per_s"] * elapsed_s / (elapsed_s - self._between_s)}
        self._log({**losses, **speed, **alone, "lr": lr, "num_workers": self._num_workers}, step)
        self._gauges.set(
            {
                "step": step,
                "total_steps": total,
                "step_at_s": time.time(),
                "checkpoint_at_s": stored_at,
                "checkpoint_interval_s": self._config.train.checkpoint_every_steps * step_s,
                "unreadable_share": self._monitor.unreadable_share,
                "unreadable_limit": self._config.data.max_unreadable,
            }
        )
        self._restart_clock()

    def unsent(self) -> list[dict[str, Any]]:
        """Metrics that have not reached MLflow yet, for the checkpoint."""
        return self._mlflow.unsent()

    def close(self) -> None:
        """Waits for MLflow, and warns of writes that were lost."""
        if lost := self._mlflow.close():
            shown = "; ".join(lost[:3]) + ("; ..." if len(lost) > 3 else "")
            self._queue.put_nowait(f"warning: MLflow did not accept {len(lost)} writes of the run. {shown}.")

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log(metrics, step)
        self._gauges.set(metrics)

    def _restart_clock(self) -> None:
        self._started, self._num_steps = time.monotonic(), 0
        self._waited_s, self._between_s = 0.0, 0.0
        self._monitor.file_bytes = 0
