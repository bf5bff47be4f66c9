"""Training runs that take seconds: their config, running them, and reading what they leave."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset, Run
from ray.util.state import list_actors

from ctmsr.config import from_dict, override, to_dict
from ctmsr.model import checkpoint
from ctmsr.model.network import ConsistencyModel
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig
from pipelines.infra.checkpoints import fetched
from pipelines.infra.progress import progress_line
from pipelines.tracking.runs import connect
from pipelines.train.run import Inputs, Outcome, check_inputs, train

TOTAL_STEPS = 12
SMALLEST = (
    "network.lq_size=8",
    "network.channel_mult=[1]",
    "network.num_heads=1",
    "loss.lpips_crop=1",
    "data.eval_crop_size=32",
    "data.eval_draws=1",
)
"""The `small` preset with the smallest possible network, on crops of 32 pixels."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    config: RunConfig
    outcome: Outcome

    @property
    def options(self) -> list[str]:
        """Command-line options that name the config in the run's folder."""
        return ["--config", f"{self.config.run_uri}/config.json"]


def run_config(bucket: str, folder: Path, *settings: str) -> RunConfig:
    """Twelve steps of four samples on two workers: nine CT, three DTM."""
    tiny = [
        "name=first",
        f"storage_uri={bucket}/runs",
        f"tracking_uri=sqlite:///{folder}/mlflow.db",
        *(f"data.{part}_uri={bucket}/photos" for part in ("train", "val", "test")),
        *SMALLEST,
        "optim.ct_steps=9",
        "optim.dtm_steps=3",
        "optim.dtm_refresh_steps=2",
        "train.global_batch_size=4",
        "train.log_every_steps=4",
        "train.checkpoint_every_steps=4",
        "train.max_failures=0",
    ]
    return changed(PRESETS["small"](), *tiny, *settings)


def changed(config: RunConfig, *settings: str) -> RunConfig:
    """The config with KEY=VALUE settings, as given on a command line."""
    return from_dict(RunConfig, override(to_dict(config), list(settings)))


def run_to_end(config: RunConfig, inputs: Inputs | None = None) -> Outcome:
    with progress_line() as progress:
        return train(config, inputs or check_inputs(config), progress)


def write_checkpoint(
    config: RunConfig, folder: str, *, weights_of: RunConfig | None = None, **meta: object
) -> None:
    """Writes to a local folder what a run of three steps would have left, without training."""
    checkpoint.save(
        Path(folder),
        model=ConsistencyModel((weights_of or config).network).state_dict(),
        config=to_dict(config),
        meta={"step": 3, **meta},
        train_state={"global_step": torch.tensor(3)},
    )


def run_named(name: str, config: RunConfig) -> Run:
    """The only MLflow run of that name."""
    client = connect(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return found


def steps_of(client: MlflowClient, run: Run, metric: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def sets_of(run: Run) -> dict[str, Dataset]:
    """The sets of pictures that an MLflow run names, by what they are for."""
    assert run.inputs
    return {used.tags[0].value: used.dataset for used in run.inputs.dataset_inputs}


def files_of(checkpoint_uri: str) -> dict[str, dict[str, object]]:
    """Sizes and hashes of the weights and of the training state."""
    with fetched(checkpoint_uri) as folder:
        return checkpoint.read_manifest(folder).files


def kill_a_worker() -> None:
    """Kills a Ray Train worker, as the kernel does when memory runs out."""
    address = (
        ray.get_runtime_context().gcs_address
    )  # this session's cluster, whatever else runs on the machine
    workers = list_actors(address, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    assert workers[0].pid
    os.kill(workers[0].pid, signal.SIGKILL)
