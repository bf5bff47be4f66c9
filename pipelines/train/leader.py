"""What rank 0 does besides training: reports and checkpoints."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from ctmsr.config import to_dict
from ctmsr.training.state import TrainState

from ..config.run_config import RunConfig
from ..data.batches import StreamMonitor
from ..infra.checkpoints import CheckpointWriter
from ..infra.storage import open_uri
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
        self._writer = CheckpointWriter(config.run_uri)
        self._file_system, self._folder = open_uri(config.run_uri)

    def report(self, state: TrainState, losses: Mapping[str, float]) -> None:
        """Reports the latest losses, the speed, and when there last was a checkpoint."""
        self.reporter.report(state, losses, self._writer.stored_at)

    def save(self, state: TrainState, *, is_last_chance: bool) -> None:
        """Saves a checkpoint in the background; Ray Train learns of it, and scores it, once it is in storage.

        With `is_last_chance`, as a node is about to be lost: waits until it is stored, and has it not scored.
        """
        meta = {
            "step": state.global_step,
            "samples_seen": state.global_step * self._config.train.global_batch_size,
            "train_version": self._loop["train_version"],
            "num_workers": ray.train.get_context().get_world_size(),
            "commit": git_commit(),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "unsent_metrics": self.reporter.unsent(),
        }
        name, writing = self._writer.save(state, to_dict(self._config), meta)

        def stored(reported: Checkpoint, _: str) -> Checkpoint:
            writing.result()
            return reported

        ray.train.report(
            {"step": state.global_step},
            Checkpoint(f"{self._folder}/{name}", self._file_system),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=stored,
            delete_local_checkpoint_after_upload=False,  # it is the one in storage
            validation=not is_last_chance,
        )
        if is_last_chance:
            self._writer.wait()

    def close(self) -> None:
        """Waits for the last checkpoint, then for MLflow."""
        self._writer.wait()
        self.reporter.close()
