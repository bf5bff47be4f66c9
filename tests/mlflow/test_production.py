"""Tracking and registry as in production: PostgreSQL, S3 artifacts, `mlflow server`; `make test-mlflow`."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.register.promotion import CHAMPION, DECISION, PROMOTED, REFUSED, rollback
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.tracking.models import load_model
from pipelines.tracking.runs import connect, ensure_experiment, preflight, tracked_run
from tests.conftest import S3
from tests.support.registering import (
    PICTURES,
    by_checkpoint,
    register_stated,
    warm_processes,
    write_checkpoint,
)
from tests.support.servers.postgres import postgres
from tests.support.servers.processes import Server, mlflow_server

pytestmark = pytest.mark.tier

NUM_STEPS = 60


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    return s3.make_bucket("mlflow-artifacts")


@pytest.fixture(scope="module")
def server(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with (
        postgres() as database,
        mlflow_server(folder, backend_uri=database, artifacts=f"{bucket}/files") as started,
    ):
        yield started


@pytest.fixture(scope="module")
def uri(server: Server) -> str:
    return preflight(server.url)


@pytest.fixture(scope="module")
def processes() -> Any:
    return warm_processes()


def log_a_run(uri: str, experiment_id: str, name: str, pause_s: float = 0.0) -> None:
    """What a training does: parameters, metrics with steps, and a picture on the slider."""
    with tracked_run(uri, experiment_id, name, params={"seed": 1}, tags={"who": name}) as run_id:
        log = MetricLogger(uri, run_id)
        for step in range(NUM_STEPS):
            log.log({"loss": 1 / (1 + step), "lpips": 0.5}, step)
            time.sleep(pause_s)
        log.image(np.zeros((8, 8, 3), np.uint8), "samples", NUM_STEPS)
        assert log.close(120) == []


def check_run(uri: str, experiment_id: str, name: str) -> None:
    client = connect(uri)
    (run,) = client.search_runs([experiment_id], f"tags.who = '{name}'")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1"}
    for metric in ("loss", "lpips"):
        history = client.get_metric_history(run.info.run_id, metric)
        assert sorted(point.step for point in history) == list(range(NUM_STEPS))
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "images"} <= files


def run_all(started: list[Any], timeout_s: float = 240) -> None:
    for process in started:
        process.start()
    for process in started:
        process.join(timeout_s)
    assert [process.exitcode for process in started] == [0] * len(started)


def check_champion(uri: str, name: str) -> int:
    """The alias loads, and gives the bytes of the checkpoint that its version says it is."""
    version = connect(uri).get_model_version_by_alias(name, CHAMPION)
    assert version.tags[DECISION] == PROMOTED
    model = load_model(uri, f"models:/{name}@champion")
    assert np.array_equal(model.predict(PICTURES), by_checkpoint(Path(version.tags["checkpoint"])))
    return int(version.version)


def test_four_processes_log_runs_at_once(uri: str, processes: Any) -> None:
    experiment_id = ensure_experiment(uri, "at once")
    names = [f"run{number}" for number in range(4)]
    run_all([processes.Process(target=log_a_run, args=(uri, experiment_id, name)) for name in names])
    for name in names:
        check_run(uri, experiment_id, name)


def test_a_server_that_restarts_loses_no_point_of_a_run(server: Server, uri: str, processes: Any) -> None:
    experiment_id = ensure_experiment(uri, "restart")
    process = processes.Process(target=log_a_run, args=(uri, experiment_id, "through", 0.1))
    process.start()
    deadline = time.monotonic() + 60
    while not connect(uri).search_runs([experiment_id], "metrics.loss < 2") and time.monotonic() < deadline:
        time.sleep(0.1)
    server.kill()
    time.sleep(1)
    server.start()
    process.join(240)
    assert process.exitcode == 0
    check_run(uri, experiment_id, "through")


def test_registrations_at_once_through_a_restart_leave_one_champion(
    server: Server, uri: str, processes: Any, s3: S3, bucket: str, tmp_path: Path
) -> None:
    first = write_checkpoint(tmp_path / "first", 0, lpips=0.5)
    assert register_stated(uri, first, "x4").is_promoted
    folders = [write_checkpoint(tmp_path / f"c{i}", i + 1, lpips=0.4 - 0.0015 * i) for i in range(4)]
    started = [processes.Process(target=register_stated, args=(uri, folder, "x4")) for folder in folders]
    for process in started:
        process.start()
    time.sleep(4)  # they are at it
    server.kill()
    server.start()
    for process in started:
        process.join(240)
    assert [process.exitcode for process in started] == [0] * 4

    client = connect(uri)
    found = client.search_model_versions("name='x4'")
    tags = {int(version.version): version.tags for version in found}
    assert {tags[number]["checkpoint"] for number in tags} == {str(path) for path in (first, *folders)}
    assert {tags[number][DECISION] for number in tags} <= {PROMOTED, REFUSED}
    expected = 1
    scores = {number: json.loads(tags[number]["gate.scores"])["lpips"] for number in tags}
    for number in sorted(tags):
        if scores[expected] - scores[number] >= 0.002:
            expected = number
    assert check_champion(uri, "x4") == expected
    keys = [one["Key"] for one in s3.client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]]
    assert sum(key.endswith("/model.safetensors") for key in keys) >= 5


def test_the_gate_decides_and_goes_back(uri: str, tmp_path: Path) -> None:
    scores = {"one": 0.4, "two": 0.3, "three": 0.35}
    decisions = {
        name: register_stated(uri, write_checkpoint(tmp_path / name, seed, lpips=lpips), "gate")
        for seed, (name, lpips) in enumerate(scores.items())
    }
    assert [decisions[name].is_promoted for name in scores] == [True, True, False]
    assert check_champion(uri, "gate") == 2
    assert rollback(uri, "gate") == ([2], 1)
    assert check_champion(uri, "gate") == 1
