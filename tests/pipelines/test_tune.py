"""A search over noise schedules: three trials of two steps, each a whole training run."""

from dataclasses import dataclass

import pytest
from mlflow.entities import Run

from ctmsr import checkpoint
from ctmsr.config import from_dict, override, to_dict
from pipelines.checkpoints import fetched, find
from pipelines.cli import config_parser, resolve
from pipelines.config import RunConfig
from pipelines.presets import PRESETS
from pipelines.progress import progress_line
from pipelines.tracking import connect
from pipelines.train import check_inputs
from pipelines.tune import Search, search, table
from tests.conftest import S3

NUM_TRIALS = 3


@dataclass(frozen=True)
class Searched:
    """A search that has ended, and its runs in MLflow."""

    config: RunConfig
    found: Search
    parent: Run
    children: list[Run]


@pytest.fixture(scope="module")
def searched(
    ray_session: None, s3: S3, photos: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Searched:
    bucket = s3.make_bucket("tuning", {f"photos/{name}": data for name, data in photos.items()})
    settings = [
        "name=tiny",
        f"storage_uri={bucket}/runs",
        f"tracking_uri=sqlite:///{tmp_path_factory.mktemp('tuning')}/mlflow.db",
        f"data.train_uri={bucket}/photos",
        f"data.val_uri={bucket}/photos/rocket.png",
        "network.lq_size=16",
        "data.eval_crop_size=64",
        "train.global_batch_size=4",
        f"tune.num_trials={NUM_TRIALS}",
        "tune.ct_steps=2",
        "tune.dtm_steps=0",
    ]
    config = from_dict(RunConfig, override(to_dict(PRESETS["small"]()), settings))
    with progress_line() as progress:
        found = search(config, check_inputs(config), progress)
    client = connect(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.info.run_name == "tiny-tune")
    return Searched(config, found, parent, [run for run in runs if run is not parent])


def test_the_own_schedule_is_among_the_trials_and_the_best_is_first(searched: Searched) -> None:
    trials = searched.found.trials
    assert len(trials) == NUM_TRIALS
    own = to_dict(searched.config.schedule)
    assert sum(trial.schedule == own for trial in trials) == 1
    assert len({trial.schedule["sigma_max"] for trial in trials}) == NUM_TRIALS
    low, high = searched.config.tune.sigma_max
    assert all(low <= trial.schedule["sigma_max"] <= high for trial in trials)
    ranks = [(-trial.step, trial.lpips) for trial in trials]
    assert ranks == sorted(ranks)
    assert trials[0].step == 2
    lines = table(trials).splitlines()
    assert len(lines) == 1 + NUM_TRIALS
    assert [line[0] for line in lines] == [" ", "*", " ", " "]


def test_the_best_config_is_written_for_train(searched: Searched) -> None:
    assert searched.found.config_uri == "s3://tuning/runs/tiny-tune/best.json"
    arguments = config_parser("train", "", "").parse_args(["--config", searched.found.config_uri])
    best = resolve(arguments)
    assert best == searched.found.config
    assert to_dict(best.schedule) == searched.found.trials[0].schedule
    assert to_dict(best) | {"schedule": None} == to_dict(searched.config) | {"schedule": None}


def test_trials_are_children_of_the_search_in_mlflow(searched: Searched) -> None:
    assert searched.parent.info.status == "FINISHED"
    assert searched.parent.data.tags["search"] == "true"
    assert len(searched.children) == NUM_TRIALS
    parents = {run.data.tags["mlflow.parentRunId"] for run in searched.children}
    assert parents == {searched.parent.info.run_id}
    assert {run.info.status for run in searched.children} == {"FINISHED"}
    tried = sorted(float(run.data.params["schedule.sigma_max"]) for run in searched.children)
    assert tried == sorted(trial.schedule["sigma_max"] for trial in searched.found.trials)


def test_a_trial_is_a_run_with_its_own_checkpoint(searched: Searched) -> None:
    run = searched.children[0]
    found = find(f"s3://tuning/runs/tiny-tune/{run.info.run_name}")
    with fetched(found.uri) as folder:
        manifest = checkpoint.read_manifest(folder)
    assert str(manifest.config["schedule"]["sigma_max"]) == run.data.params["schedule.sigma_max"]
    assert manifest.config["optim"]["ct_steps"] == 2
    assert manifest.meta["step"] in (1, 2)  # ASHA may stop it at its last report, before that is stored
