"""Reports on a training run from rank 0: progress line, MLflow, Ray's metrics, scores of the EMA weights."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
from ray.util.metrics import Gauge
from ray.util.queue import Queue

from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import Evaluation, score
from ctmsr.model.inference import for_inference, upscale
from ctmsr.training.state import TrainState

from ..config.run_config import RunConfig
from ..data.batches import StreamMonitor
from ..infra.progress import Progress, Scores
from ..tracking.metric_logger import MetricLogger


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
        self._gauges: dict[str, Gauge] = {}
        self._held_out = list(ray.train.get_dataset_shard("val").iter_rows())
        self._lpips = load_lpips("alex").to(ray.train.torch.get_device())
        self._set_gauges({"step_at_s": time.time()})  # a run that never gets to a step has stalled, too
        self._restart_clock()

    def count(self, waited_s: float) -> None:
        """Counts a step and the seconds it waited for data."""
        self._num_steps += 1
        self._waited_s += waited_s

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
        self._log({**losses, **speed, "lr": lr, "num_workers": self._num_workers}, step)
        self._set_gauges(
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

    def evaluate(self, state: TrainState) -> Evaluation:
        """Scores the EMA weights on the held-out pictures and logs scores and samples to MLflow."""
        started = time.monotonic()
        upscale_one = partial(
            upscale,
            for_inference(state.ema_model, ray.train.torch.get_device(), self._config.inference),
            sigma_max=self._config.schedule.sigma_max,
            config=self._config.inference,
        )
        scale = self._config.network.scale
        evaluation = score(upscale_one, self._held_out, scale=scale, lpips=self._lpips)
        means = evaluation.means
        self._log({f"val_{name}": value for name, value in means.items()}, state.global_step)
        self._queue.put_nowait(Scores(self._config.name, state.global_step, means))
        self._mlflow.image(np.ascontiguousarray(evaluation.grid_u8), "val", state.global_step)
        self._started += time.monotonic() - started  # excluded from the step rate
        return evaluation

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
        self._set_gauges(metrics)

    def _set_gauges(self, values: Mapping[str, float]) -> None:
        """Sets Ray's metrics `ctmsr_<name>`; those with alerts are in cluster/kubernetes/monitoring."""
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"ctmsr_{name}", f"{name} of a training run", tag_keys=("run",))
            self._gauges[name].set(value, {"run": self._config.name})

    def _restart_clock(self) -> None:
        self._started, self._num_steps, self._waited_s = time.monotonic(), 0, 0.0
        self._monitor.file_bytes = 0
