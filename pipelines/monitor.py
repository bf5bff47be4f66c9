"""What rank 0 tells of a training run: progress line, metrics and pictures in MLflow, scores of the EMA."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue

from ctmsr.perceptual import load_lpips
from ctmsr.train_state import TrainState

from .batches import Intake
from .config import RunConfig
from .evaluate import score
from .progress import Progress
from .tracking import MetricLogger


class Monitor:
    """Rank 0's view of the run: the progress line, MLflow, and the score of the EMA weights."""

    def __init__(self, config: RunConfig, loop: Mapping[str, Any], intake: Intake) -> None:
        self._config = config
        self._intake = intake
        self._queue: Queue = loop["progress"]
        self._mlflow = MetricLogger(loop["tracking_uri"], loop["run_id"])
        self._held_out = list(ray.train.get_dataset_shard("val").iter_rows())
        self._lpips = load_lpips("alex").to(ray.train.torch.get_device())
        self._restart_clock()

    def step(self, state: TrainState, losses: Mapping[str, torch.Tensor], waited_s: float) -> None:
        """Counts one step; every log_every_steps, says how it goes."""
        self._num_steps += 1
        self._waited_s += waited_s
        step, total = state.global_step, self._config.optim.total_steps
        if self._num_steps < self._config.train.log_every_steps and step < total:
            return
        elapsed_s = time.monotonic() - self._started
        step_s = elapsed_s / self._num_steps
        values = {name: value.item() for name, value in losses.items()}
        speed = {
            "images_per_s": self._config.train.global_batch_size / step_s,
            "data_wait": self._waited_s / self._num_steps / step_s,
            "data_mb_per_s": self._intake.file_bytes * self._config.train.num_workers / 1e6 / elapsed_s,
        }
        self._queue.put_nowait(
            Progress(
                name=self._config.name,
                phase="DTM" if "dtm_loss" in values else "CT",
                step=step,
                total_steps=total,
                loss=values["loss"],
                eta_s=(total - step) * step_s,
                **speed,
            )
        )
        self._mlflow.log(values | speed | {"lr": state.optimizer.param_groups[0]["lr"]}, step)
        self._restart_clock()

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Scores the EMA weights on the held-out pictures, and shows them in MLflow."""
        started = time.monotonic()
        evaluation = score(
            state.ema_model.eval(),
            self._held_out,
            sigma_max=self._config.schedule.sigma_max,
            inference=self._config.inference,
            lpips=self._lpips,
        )
        self._mlflow.log(
            {f"val_{name}": value for name, value in evaluation.means.items()}, state.global_step
        )
        self._mlflow.image(np.ascontiguousarray(evaluation.grid_u8), "val", state.global_step)
        self._started += time.monotonic() - started  # not a part of the step rate
        return evaluation.means

    def close(self) -> None:
        """Waits for MLflow."""
        self._mlflow.close()

    def _restart_clock(self) -> None:
        self._started, self._num_steps, self._waited_s = time.monotonic(), 0, 0.0
        self._intake.file_bytes = 0
