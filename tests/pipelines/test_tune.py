"""A search over noise schedules: trials of a few steps, each a whole training run."""

import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Run
from ray.util import placement_group_table

from ctmsr.config import from_dict, override, to_dict
from ctmsr.errors import ConfigError
from ctmsr.image import decode
from ctmsr.model import checkpoint
from pipelines.config.command_line import config_parser, resolve
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig
from pipelines.infra.checkpoints import complete, fetched, find
from pipelines.infra.progress import progress_line
from pipelines.infra.storage import list_sizes, open_uri, read_bytes, write_bytes
from pipelines.tracking.runs import connect
from pipelines.tune.run import Search, check_search, search
from pipelines.tune.verdict import chosen
from tests.conftest import PHOTOS, S3
from tests.pipelines.test_demo import wait_until_gone
from tests.support.repository import ROOT
from tests.support.runs import SMALLEST

NUM_TRIALS = 3


@dataclass(frozen=True)
class Searched:
    """A search that has ended, and its runs in MLflow."""

    config: RunConfig
    found: Search
    parent: Run
    children: list[Run]


def config_of(places: list[str], *settings: str) -> RunConfig:
    """Trials of four steps of four samples, on one worker each."""
    tiny = [
        "name=tiny",
        *SMALLEST,
        "train.num_workers=1",
        "train.global_batch_size=4",
        "train.log_every_steps=1",
        f"tune.num_trials={NUM_TRIALS}",
        "tune.ct_steps=4",
    ]
    return from_dict(RunConfig, override(to_dict(PRESETS["small"]()), [*tiny, *places, *settings]))


def search_to_end(config: RunConfig, *, fresh: bool = False) -> Searched:
    with progress_line() as progress:
        found = search(config, check_search(config, fresh=fresh), progress, fresh=fresh)
    return Searched(config, found, *runs_of(config))


def runs_of(config: RunConfig) -> tuple[Run, list[Run]]:
    """The latest run of the search, and those of its trials."""
    client = connect(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    parent, *_ = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{config.name}-tune'")
    below = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    return parent, client.search_runs([experiment.experiment_id], below)


@pytest.fixture(scope="module")
def places(
    ray_session: None, s3: S3, photos: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    bucket = s3.make_bucket("tuning", {f"photos/{name}": data for name, data in photos.items()})
    return [
        f"storage_uri={bucket}/runs",
        f"tracking_uri=sqlite:///{tmp_path_factory.mktemp('tuning')}/mlflow.db",
        f"data.train_uri={bucket}/photos",
        f"data.val_uri={bucket}/photos",
    ]


@pytest.fixture(scope="module")
def searched(places: list[str]) -> Searched:
    return search_to_end(config_of(places, "data.eval_draws=2"))


def test_the_own_schedule_is_among_the_trials_and_the_best_is_first(searched: Searched) -> None:
    trials = searched.found.trials
    assert sorted(one.trial.number for one in trials) == list(range(NUM_TRIALS))
    own = next(one for one in trials if one.trial.number == 0)
    schedule = to_dict(searched.config.schedule)
    assert own.trial.point == {f"schedule.{key}": value for key, value in schedule.items()}
    assert own.step == 4
    low, high = searched.config.tune.sigma_max
    assert all(low <= one.trial.point["schedule.sigma_max"] <= high for one in trials)
    ranks = [(-one.step, one.objective) for one in trials]
    assert ranks == sorted(ranks)


def test_the_best_config_and_the_report_are_in_storage_and_in_mlflow(searched: Searched) -> None:
    assert searched.found.config_uri == "s3://tuning/runs/tiny-tune/best.json"
    arguments = config_parser("train", "", "").parse_args(["--config", searched.found.config_uri])
    best = resolve(arguments)
    assert best == searched.found.config
    point = chosen(searched.found.trials).trial.point
    assert {f"schedule.{key}": value for key, value in to_dict(best.schedule).items()} == point
    assert to_dict(best) | {"schedule": None} == to_dict(searched.config) | {"schedule": None}

    client, run_id = connect(searched.config.tracking_uri), searched.parent.info.run_id
    logged = {file.path for file in client.list_artifacts(run_id)}
    for name in ("best.json", "trials.txt", "schedules.png", "parallel.png"):
        assert name in logged
        file_system, path = open_uri(f"s3://tuning/runs/tiny-tune/{name}")
        data = read_bytes(file_system, path)
        if name.endswith(".png"):
            assert min(decode(data, name=name).shape[:2]) > 100
    assert searched.found.report.count("trial-00") >= NUM_TRIALS
    assert searched.parent.data.metrics["objective"] == searched.found.trials[0].objective


def test_each_trial_has_a_score_of_every_picture(searched: Searched) -> None:
    for one in searched.found.trials:
        assert len(one.score.lpips_by_picture) == len(PHOTOS)  # not of every draw
        assert float(np.mean(one.score.lpips_by_picture)) == pytest.approx(one.score.lpips)
        assert len(set(one.score.lpips_by_picture)) == len(PHOTOS)


def test_trials_that_were_stopped_keep_no_places(searched: Searched) -> None:
    assert any(one.step < 4 for one in searched.found.trials)  # stopped early
    deadline = time.monotonic() + 30
    while held := [group for group in placement_group_table().values() if group["state"] != "REMOVED"]:
        assert time.monotonic() < deadline, held
        time.sleep(0.5)


def test_trials_are_children_of_the_search_in_mlflow(searched: Searched) -> None:
    assert searched.parent.info.status == "FINISHED"
    assert searched.parent.data.tags["search"] == "true"
    assert {run.info.run_name for run in searched.children} == {f"trial-{n:03d}" for n in range(NUM_TRIALS)}
    assert {run.info.status for run in searched.children} == {"FINISHED"}
    client = connect(searched.config.tracking_uri)
    for run in searched.children:
        one = next(one for one in searched.found.trials if one.trial.name == run.info.run_name)
        assert run.data.params == {key: str(value) for key, value in one.trial.point.items()}
        assert run.data.metrics["objective"] == one.objective
        assert run.data.tags.keys() >= {"train_version", "val_version", "version.torch", "version.ray"}
        logged = {
            point.step: point.value for point in client.get_metric_history(run.info.run_id, "val_lpips")
        }
        assert logged[one.step] == one.score.lpips
        assert client.list_artifacts(run.info.run_id, "images")  # the slider
    assert searched.parent.data.tags.keys() >= {"val_version", "version.torch", "version.optuna"}


def test_a_trial_is_a_run_with_its_own_checkpoint(searched: Searched) -> None:
    run = searched.children[0]
    found = find(f"s3://tuning/runs/tiny-tune/{run.info.run_name}")
    with fetched(found.uri) as folder:
        manifest = checkpoint.read_manifest(folder)
    assert str(manifest.config["schedule"]["sigma_max"]) == run.data.params["schedule.sigma_max"]
    assert manifest.config["optim"]["ct_steps"] == 4


def test_the_same_command_again_trains_nothing(searched: Searched) -> None:
    files = list_sizes("s3://tuning/runs/tiny-tune")
    again = search_to_end(searched.config)
    assert again.found == searched.found
    assert again.parent.info.run_id == searched.parent.info.run_id
    assert {path for path in list_sizes("s3://tuning/runs/tiny-tune") if "checkpoint_" in str(path)} == {
        path for path in files if "checkpoint_" in str(path)
    }


@pytest.fixture(scope="module")
def short(searched: Searched, places: list[str]) -> Searched:
    """Another search of one trial, which starts over in the folder of `searched`, whose tests stand above.

    All trials that could follow begin with less noise, and are better so early.
    """
    settings = ["tune.num_trials=1", "tune.method=tpe", "tune.sigma_max=[0.01, 0.05]"]
    config = config_of(places, *settings)
    with pytest.raises(ConfigError, match=r"tiny-tune holds another search \(data.eval_draws: 2 -> 1, "):
        check_search(config)
    return search_to_end(config, fresh=True)


@pytest.fixture(scope="module")
def failed(short: Searched, s3: S3, photos: dict[str, bytes]) -> Searched:
    """The same search with one more trial, which fails: a picture is damaged after the check."""
    config = replace(short.config, tune=replace(short.config.tune, num_trials=2))
    inputs = check_search(config)
    s3.client.put_object(Bucket="tuning", Key="photos/coffee.png", Body=photos["coffee.png"][:2000])
    with progress_line() as progress:
        found = search(config, inputs, progress)
    s3.client.put_object(Bucket="tuning", Key="photos/coffee.png", Body=photos["coffee.png"])
    return Searched(config, found, *runs_of(config))


@pytest.fixture(scope="module")
def longer(failed: Searched) -> Searched:
    """The same search once the picture is whole again."""
    return search_to_end(failed.config)


def test_fresh_starts_over(searched: Searched, short: Searched) -> None:
    assert short.parent.info.run_id != searched.parent.info.run_id
    assert [run.info.run_name for run in short.children] == ["trial-000"]
    assert short.children[0].info.run_id not in {run.info.run_id for run in searched.children}
    stored = {str(path).partition("/")[0] for path in list_sizes("s3://tuning/runs/tiny-tune")}
    assert {name for name in stored if name.startswith("trial-")} == {"trial-000"}


def test_a_trial_that_fails_does_not_end_the_search_and_is_tried_again(
    short: Searched, failed: Searched, longer: Searched
) -> None:
    assert failed.found.trials == short.found.trials
    assert "trial-001 failed: " in failed.found.report
    assert "DataError: tuning/photos/coffee.png is not a readable picture" in failed.found.report
    assert {run.info.run_name: run.info.status for run in failed.children}["trial-001"] == "FAILED"
    assert len(longer.found.trials) == 2
    assert "failed" not in longer.found.report


def test_one_more_trial_trains_only_that(short: Searched, longer: Searched) -> None:
    assert [one for one in longer.found.trials if one.trial.number == 0] == short.found.trials
    assert {run.info.run_id for run in short.children} < {run.info.run_id for run in longer.children}
    assert len(longer.found.trials) == 2
    assert longer.parent.info.run_id == short.parent.info.run_id


def test_a_schedule_that_is_better_over_the_pictures_is_the_best_config(
    short: Searched, longer: Searched
) -> None:
    assert short.found.config.schedule == short.config.schedule
    assert longer.found.config.schedule.sigma_max < 0.06
    own, other = sorted(longer.found.trials, key=lambda one: one.trial.number)
    told = longer.found.report.splitlines()[-1]
    assert told.startswith("against the run's own schedule: LPIPS -0.")
    assert told.endswith(f"over {len(PHOTOS)} pictures (95%): better. best.json holds trial-001.")
    assert other.score.lpips < own.score.lpips


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tpe", "pbt"])
def test_other_methods_end_with_a_best_trial(places: list[str], method: str) -> None:
    settings = [f"name={method}", f"tune.method={method}", "tune.num_trials=4", "tune.ct_steps=4"]
    searched = search_to_end(config_of(places, *settings))
    trials = searched.found.trials
    assert len(trials) == 4
    assert {one.step for one in trials} == {4}
    if method == "pbt":
        assert len(searched.children) == 16
        names = [run.info.run_name for run in searched.children]
        copies = [name for name in names if "-from-" in name]
        assert copies
        for name in copies:  # it has the parent's checkpoint, and trained on from there
            _, _, generation, _, donor = name.split("-")
            start = int(generation) - 1
            (parent,) = (other for other in names if other.startswith(f"trial-{donor}-{start}"))
            found = {one.step: one for one in complete(f"s3://tuning/runs/pbt-tune/{name}")}
            assert sorted(found) == [start, start + 1]
            origin = {one.step: one for one in complete(f"s3://tuning/runs/pbt-tune/{parent}")}[start]
            assert (found[start].meta, found[start].config) == (origin.meta, origin.config)


def command(name: str, folder: Path) -> list[str]:
    """A search of four trials of eight steps, on a Ray of its own."""
    settings = {
        "name": name,
        "storage_uri": f"{folder}/runs",
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "data.train_uri": f"{folder}/photos",
        "data.val_uri": f"{folder}/photos/rocket.png",
        "network.lq_size": 16,
        "network.channel_mult": "[1, 2]",
        "data.eval_crop_size": 64,
        "data.eval_draws": 1,
        "train.global_batch_size": 4,
        "tune.num_trials": 4,
        "tune.ct_steps": 8,
    }
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "pipelines.tune", *pairs]


def kill_at(num_checkpoints: int, name: str, folder: Path) -> None:
    """Starts the search, and kills the driver once its trials have so many checkpoints together."""
    marker = uuid.uuid4().hex
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    driver = subprocess.Popen(
        command(name, folder),
        cwd=ROOT,
        env=environment | {"CTMSR_TEST_MARKER": marker},
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while len(list(folder.glob(f"runs/{name}-tune/*/*/{checkpoint.MANIFEST_FILE}"))) < num_checkpoints:
        assert driver.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert wait_until_gone(marker, timeout_s=60) == []


@pytest.mark.slow
def test_a_search_whose_driver_is_killed_ends_with_the_same_trials(
    photos: dict[str, bytes], tmp_path: Path
) -> None:
    for name, data in photos.items():
        write_bytes(f"{tmp_path}/photos/{name}", data)
    subprocess.run(command("whole", tmp_path), cwd=ROOT, check=True)
    kill_at(2, "killed", tmp_path)
    kill_at(5, "killed", tmp_path)
    subprocess.run(command("killed", tmp_path), cwd=ROOT, check=True)
    whole, killed = tmp_path / "runs/whole-tune", tmp_path / "runs/killed-tune"
    assert (killed / "trials.txt").read_text() == (whole / "trials.txt").read_text()
    best = json.loads((killed / "best.json").read_text())
    assert best | {"name": "whole"} == json.loads((whole / "best.json").read_text())
    config = from_dict(RunConfig, best)
    parent, children = runs_of(config)
    assert parent.info.status == "FINISHED"
    assert {run.info.run_name for run in children} == {f"trial-{number:03d}" for number in range(4)}
    assert len(children) == 4  # each went on with the run that it had
