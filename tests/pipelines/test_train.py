"""Training on Ray: what a run leaves behind, and how it ends, goes on and fails."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.util.state import list_actors, list_tasks

from ctmsr import checkpoint
from ctmsr.config import from_dict, override, to_dict
from ctmsr.errors import UserError
from ctmsr.inference import upscale
from pipelines import evaluate as evaluate_module
from pipelines import register as register_module
from pipelines.config import RunConfig
from pipelines.evaluate import evaluate, find_checkpoint, local_checkpoint
from pipelines.presets import PRESETS
from pipelines.progress import progress_line
from pipelines.register import load_model
from pipelines.storage import list_images
from pipelines.tracking import connect
from pipelines.train import Inputs, Outcome, check_inputs, train
from tests.conftest import S3

TOTAL_STEPS = 5


@dataclass(frozen=True)
class Trained:
    """A run that has ended."""

    config: RunConfig
    outcome: Outcome

    @property
    def settings(self) -> list[str]:
        """For the command line."""
        return [f"--set={key}={value}" for key, value in PLACES(self.config).items()]


def run_config(bucket: str, folder: Path, *settings: str) -> RunConfig:
    """Five steps of eight samples on two workers: three CT, two DTM."""
    tiny = [
        "name=first",
        f"storage_uri={bucket}/runs",
        f"tracking_uri=sqlite:///{folder}/mlflow.db",
        *(f"data.{part}_uri={bucket}/photos" for part in ("train", "val", "test")),
        "data.eval_crop_size=64",
        "optim.ct_steps=3",
        "optim.dtm_steps=2",
        "optim.dtm_refresh_steps=1",
        "train.global_batch_size=8",
        "train.log_every_steps=2",
        "train.checkpoint_every_steps=3",
        "train.max_failures=0",
    ]
    return from_dict(RunConfig, override(to_dict(PRESETS["small"]()), [*tiny, *settings]))


def run_to_end(config: RunConfig, inputs: Inputs | None = None) -> Outcome:
    with progress_line() as progress:
        return train(config, inputs or check_inputs(config), progress)


def last_run(config: RunConfig) -> Run:
    client = connect(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]


@pytest.fixture(scope="module")
def bucket(s3: S3, photos: dict[str, bytes]) -> str:
    return s3.make_bucket("training", {f"photos/{name}": data for name, data in photos.items()})


@pytest.fixture(scope="module")
def trained(ray_session: None, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = run_config(bucket, tmp_path_factory.mktemp("training"))
    return Trained(config, run_to_end(config))


def test_a_run_ends_with_a_checkpoint_of_its_last_step(trained: Trained) -> None:
    assert find_checkpoint(trained.config) == trained.outcome.checkpoint_uri
    with local_checkpoint(trained.outcome.checkpoint_uri) as folder:
        model, manifest = checkpoint.load_model(folder)
        state = checkpoint.load_train_state(folder)
    assert manifest.config == to_dict(trained.config)
    assert manifest.meta == trained.outcome.metrics
    assert manifest.meta["step"] == int(state["global_step"]) == TOTAL_STEPS
    weights = model.state_dict()
    assert any(not torch.equal(weights[name], state[f"model.{name}"]) for name in weights)  # EMA differs
    assert any(name.startswith("dtm.") for name in state)


def test_a_run_tells_mlflow_how_it_went(trained: Trained) -> None:
    client = connect(trained.config.tracking_uri)
    told = client.get_run(trained.outcome.run_id)
    assert told.info.status == "FINISHED"
    assert told.data.params["schedule.sigma_max"] == str(trained.config.schedule.sigma_max)
    steps = {name: steps_of(client, told, name) for name in ("loss", "dtm_loss", "images_per_s", "val_lpips")}
    assert steps == {"loss": [2, 4, 5], "dtm_loss": [4, 5], "images_per_s": [2, 4, 5], "val_lpips": [3, 5]}
    assert told.data.metrics["val_lpips"] == pytest.approx(trained.outcome.metrics["lpips"])
    assert told.data.metrics["images_per_s"] > 0
    assert any("val" in file.path for file in client.list_artifacts(told.info.run_id, "images"))


def steps_of(client: MlflowClient, run: Run, metric: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def test_pictures_are_read_and_degraded_by_ray_data_tasks(trained: Trained) -> None:
    tasks = list_tasks(limit=1000, filters=[("state", "=", "FINISHED")], detail=False)
    names = [task.name for task in tasks]
    assert any("MapBatches(_train_rows)" in name for name in names), sorted(set(names))
    assert any("MapBatches(_val_rows)" in name for name in names), sorted(set(names))


def test_a_finished_run_started_again_ends_at_once(trained: Trained) -> None:
    again = run_to_end(trained.config)
    assert again.checkpoint_uri == trained.outcome.checkpoint_uri
    assert again.metrics == trained.outcome.metrics


def test_evaluate_compares_the_run_with_bicubic(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_module.main(trained.settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["PSNR-Y", "bicubic", "ours", "written:"]
    # the held-out pictures are those of data.val_uri here, so the scores are the run's own
    evaluation = evaluate(
        trained.config, trained.outcome.checkpoint_uri, list_images(trained.config.data.test_uri)
    )
    means = trained.outcome.metrics | {}
    del means["step"]
    assert evaluation.means == pytest.approx(means, abs=1e-4)


def test_register_releases_the_bytes_of_the_checkpoint(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert register_module.main(trained.settings) == 0
    assert f"@champion is version 1, from {trained.outcome.checkpoint_uri}" in capsys.readouterr().out
    released = load_model(trained.config.tracking_uri, f"models:/{trained.config.model_name}@champion")
    lq_u8 = np.random.default_rng(0).integers(0, 256, (1, 20, 24, 3), np.uint8)
    with local_checkpoint(trained.outcome.checkpoint_uri) as folder:
        model, _ = checkpoint.load_model(folder)
    sr_u8 = upscale(model, lq_u8[0], sigma_max=trained.config.schedule.sigma_max, seed=5)
    assert np.array_equal(released.predict(lq_u8, params={"seed": 5})[0], sr_u8)
