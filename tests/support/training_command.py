"""`python -m pipelines.train` as a child process, and its losses as seen in MLflow."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from tests.support.child import Child

NUM_CPUS = 2
"""CPUs per worker. A node of NUM_CPUS + 1 fits one worker, and makes data with the remaining CPU."""
BATCH = 8
SETTINGS = (
    "experiment=nodes",
    "network.lq_size=16",
    "network.channel_mult=[1, 2]",
    "data.eval_crop_size=64",
    "data.eval_draws=1",
    "optim.dtm_refresh_steps=20",
    f"train.global_batch_size={BATCH}",
    f"train.cpus_per_worker={NUM_CPUS}",
    "train.log_every_steps=1",
    "train.checkpoint_every_steps=10",
)
"""A run whose steps take a tenth of a second each, with every step in MLflow."""


@dataclass(frozen=True)
class Point:
    """One loss in MLflow."""

    step: int
    loss: float
    time_s: float
    """When the step finished, in seconds since the epoch."""


def start_training(
    settings: Iterable[str], env: Mapping[str, str], log: Path, enter: tuple[str, ...] = ()
) -> Child:
    """Starts the command with `SETTINGS` and more settings; `enter` is a prefix such as `ip netns exec`."""
    options = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return Child([*enter, sys.executable, "-m", "pipelines.train", *options], env, log)


def logged(client: MlflowClient, name: str) -> list[Point]:
    """The losses of all MLflow runs of that name, in order of time."""
    experiment = client.get_experiment_by_name("nodes")
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    histories = [client.get_metric_history(run.info.run_id, "loss") for run in runs]
    found = [
        Point(point.step, point.value, point.timestamp / 1000) for points in histories for point in points
    ]
    return sorted(found, key=lambda point: point.time_s)
