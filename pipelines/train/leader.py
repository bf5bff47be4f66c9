"""What rank 0 does besides training: reports and checkpoints."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import ray.train

from ctmsr.config import to_dict
from ctmsr.training.state import TrainState

from ..config.run_config import RunConfig
from ..data.batches import StreamMonitor
from ..infra.checkpoints import LPIPS_BY_PICTURE, CheckpointWriter
from ..tracking.runs import git_commit
from .reporting import Reporter

LIBRARIES = ("torch", "ray", "numpy", "opencv-python-headless", "pillow", "lpips")
"""Libraries whose versions a checkpoint records, as another version may round or draw differently."""


class Leader:
    """Reports on the run and writes its checkpoints."""

    def __init__(
        self, config: RunConfig, loop: Mapping[str, Any], monitor: StreamMonitor, unsent: list[dict[str, Any]]
    ) -> None:
        self._config, self._loop = config, loop
        self.reporter = Reporter(config, loop, monitor, unsent)
        self._writer = CheckpointWriter(
            config.run_uri,
            num_kept=config.train.num_checkpoints_kept,
            num_best_kept=config.train.num_best_kept,
        )

    def report(self, state: TrainState, losses: Mapping[str, float]) -> None:
        """Reports the latest losses, the speed, and when there last was a checkpoint."""
        self.reporter.report(state, losses, self._writer.stored_at)

    def save(self, state: TrainState, is_preempted: bool) -> dict[str, float]:
        """Scores the EMA weights and saves a checkpoint; skips the scores if a node is about to be lost."""
        evaluation = None if is_preempted else self.reporter.evaluate(state)
        metrics = evaluation.means if evaluation else {}
        meta = {
            "step": state.global_step,
            "samples_seen": state.global_step * self._config.train.global_batch_size,
            "metrics": metrics,
            LPIPS_BY_PICTURE: evaluation.by_picture("lpips") if evaluation else [],
            "train_version": self._loop["train_version"],
            "num_workers": ray.train.get_context().get_world_size(),
            "commit": git_commit(),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "unsent_metrics": self.reporter.unsent(),
        }
        self._writer.save(state, to_dict(self._config), meta)
        if is_preempted:
            self._writer.wait()
        return metrics

    def close(self) -> None:
        """Waits for the last checkpoint, then for MLflow."""
        self._writer.wait()
        self.reporter.close()
