"""Runs in a real MLflow database: checked before a training, never in its way, and complete after it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ctmsr.errors import TrackingError
from pipelines.tracking import runs as tracking
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.tracking.runs import ensure_experiment, find_run, preflight, tracked_run


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return preflight(f"sqlite:///{tmp_path_factory.mktemp('a folder')}/new/mlflow.db")


@pytest.fixture(scope="module")
def experiment_id(uri: str) -> str:
    return ensure_experiment(uri, "toy")


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return tracking.connect(uri)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def locked_server() -> Iterator[str]:
    """Answers as MLflow does where a login is asked for and none is given."""

    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401, explain="You are not authenticated.")

        do_POST = do_GET

    with HTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_server_that_asks_for_a_login_says_how_to_give_one(locked_server: str) -> None:
    with pytest.raises(TrackingError, match=r"refuses the login\. Set MLFLOW_TRACKING_USERNAME and"):
        preflight(locked_server)


@pytest.mark.timed
def test_a_dead_server_is_an_error_at_once(closed_port: str) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match=f"the MLflow server {closed_port} does not answer"):
        preflight(closed_port)
    assert time.monotonic() - started < 5


@pytest.mark.timed
def test_a_silent_server_is_an_error_within_seconds(silent_server: str) -> None:
    before = dict(os.environ)
    started = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer"):
        preflight(silent_server)
    assert time.monotonic() - started < 10
    after = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP")}
    assert after == {name: value for name, value in before.items() if name.startswith("MLFLOW_HTTP")}


@pytest.mark.parametrize("uri", ["", "mlruns", "file:///tmp/mlruns", "ftp://host/x", "sqlite:///"])
def test_other_addresses_are_refused_with_the_allowed_ones(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"must be http\(s\)://host:port .* or sqlite:///file\.db, got"):
        preflight(uri)


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_login_in_the_address_is_refused_and_not_repeated(scheme: str) -> None:
    with pytest.raises(TrackingError, match="has a login in it") as refused:
        preflight(f"{scheme}://me:hunter2@host:5000")
    assert "hunter2" not in str(refused.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, but long enough to be read as one " * 10)
    with pytest.raises(TrackingError, match=r"notes\.db cannot be used: .*file is not a database"):
        preflight(f"sqlite:///{tmp_path}/notes.db")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(TrackingError, match=r"taken/mlflow\.db cannot be used"):
        preflight(f"sqlite:///{tmp_path}/taken/mlflow.db")


def test_a_relative_path_is_made_absolute_for_the_workers(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    monkeypatch.chdir(path.parent.parent)
    assert preflight("sqlite:///new/mlflow.db") == uri


@pytest.mark.parametrize("name", ["a%20b", "a?b"])
def test_a_path_that_mlflow_would_read_as_another_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"its path has a % or \? in it\. Set tracking_uri"):
        preflight(f"sqlite:///{tmp_path}/{name}/mlflow.db")
    assert not any(tmp_path.iterdir())


def test_a_home_folder_and_a_quote_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    uri = preflight("sqlite:///~/o'brien #1/mlflow.db")
    assert uri == f"sqlite:///{tmp_path}/o'brien #1/mlflow.db"
    experiment_id, tags = ensure_experiment(uri, "quoted"), {"storage": "/home/o'brien/runs"}
    with tracked_run(uri, experiment_id, "run", params={}, tags=tags) as run_id:
        assert find_run(uri, experiment_id, tags) == run_id


def test_drivers_that_start_together_share_a_new_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    code = f"from pipelines.tracking.runs import *; print(ensure_experiment(preflight({uri!r}), 'toy'))"
    drivers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) for _ in range(4)
    ]
    printed = [driver.communicate(timeout=100) for driver in drivers]
    assert printed == [("1\n", "")] * 4


def test_files_of_a_sqlite_experiment_lie_beside_the_database(
    uri: str, experiment_id: str, client: MlflowClient
) -> None:
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
    assert client.get_experiment(experiment_id).artifact_location == folder.as_uri()
    assert ensure_experiment(uri, "toy") == experiment_id


def test_a_deleted_experiment_says_how_to_restore_it(uri: str, client: MlflowClient) -> None:
    deleted = ensure_experiment(uri, "old")
    client.delete_experiment(deleted)
    with pytest.raises(TrackingError, match=f"'old' .* is deleted. Restore it with .*restore -x {deleted}`"):
        ensure_experiment(uri, "old")


def test_a_run_holds_the_whole_config(
    uri: str, experiment_id: str, client: MlflowClient, tmp_path: Path
) -> None:
    config = {"seed": 1, "loss": {"weight": 0.5, "range": [0.1, 0.5]}, "text": "x" * 9000}
    config |= {f"k{i}": i for i in range(250)}
    with tracked_run(uri, experiment_id, "parent", params={}, tags={}) as parent_id:
        pass
    with tracked_run(
        uri, experiment_id, "child", params=config, tags={"data": "v1"}, parent_run_id=parent_id
    ) as run_id:
        assert client.get_run(run_id).info.status == "RUNNING"
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.weight"] == "0.5"
    assert run.data.params["k249"] == "249"
    assert run.data.params["text"] == "x" * tracking.MAX_PARAM_CHARS
    assert run.data.tags.items() >= {"data": "v1", "mlflow.parentRunId": parent_id}.items()
    saved = client.download_artifacts(run_id, "config.json", str(tmp_path))
    assert "x" * 9000 in Path(saved).read_text()


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_that_breaks_off_says_so(
    uri: str, experiment_id: str, client: MlflowClient, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), tracked_run(uri, experiment_id, "r", params={}, tags={}) as run_id:
        raise error
    assert client.get_run(run_id).info.status == status


def test_metrics_and_pictures_arrive_in_order(uri: str, experiment_id: str, client: MlflowClient) -> None:
    with tracked_run(uri, experiment_id, "r", params={}, tags={}) as run_id:
        log = MetricLogger(uri, run_id)
        for step in range(30):
            log.log({"loss": 1 / (step + 1), "lr": float("nan")}, step)
        log.image(np.zeros((8, 8, 3), np.uint8), "sr/0", 29)
        assert log.close() == []
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(s, 1 / (s + 1)) for s in range(30)]
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    assert len(pictures) == 1
    assert "sr~0+step+29+" in pictures[0]


def test_what_is_lost_is_named(uri: str) -> None:
    log = MetricLogger(uri, "0" * 32)
    log.log({"loss": 1.0}, 5)
    log.image(np.zeros((8, 8, 3), np.uint8), "sr", 6)
    metrics, picture = log.close()
    assert metrics.startswith("metrics of step 5: Run with id=")
    assert picture.startswith("picture sr of step 6: Run with id=")


@pytest.mark.timed
def test_a_server_that_hangs_does_not_hold_up_a_step(silent_server: str) -> None:
    log = MetricLogger(silent_server, "0" * 32)
    started = time.monotonic()
    for step in range(100):
        log.log({"loss": 1.0}, step)
    assert time.monotonic() - started < 0.5
    assert [point["step"] for point in log.unsent()] == list(range(100))
    lost = log.close(timeout_s=0.2)
    assert time.monotonic() - started < 2
    assert lost == [f"metrics of step {step}: not written in time" for step in range(100)]


def test_what_a_checkpoint_held_of_the_waiting_metrics_arrives_once(
    silent_server: str, uri: str, experiment_id: str, client: MlflowClient
) -> None:
    away = MetricLogger(silent_server, "0" * 32)
    for step in range(3):
        away.log({"loss": step / 4}, step)
    held = json.loads(json.dumps(away.unsent()))
    with tracked_run(uri, experiment_id, "r", params={}, tags={}) as run_id:
        for _ in range(2):  # a run may be killed again before the next checkpoint
            assert MetricLogger(uri, run_id, held).close() == []
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_a_run_goes_on_under_its_id(uri: str, experiment_id: str, client: MlflowClient) -> None:
    tags = {"storage": "s3://bucket/runs/r"}
    assert find_run(uri, experiment_id, tags) is None
    with pytest.raises(ValueError), tracked_run(uri, experiment_id, "r", params={"a": 1}, tags=tags) as first:  # noqa: PT011
        raise ValueError
    known = find_run(uri, experiment_id, tags)
    assert known == first
    with tracked_run(uri, experiment_id, "r", params={"a": 2}, tags=tags, run_id=known) as again:
        assert client.get_run(again).info.status == "RUNNING"
    assert again == first
    run = client.get_run(first)
    assert (run.info.status, run.data.params) == ("FINISHED", {"a": "1"})


def test_a_server_that_hangs_does_not_hold_up_the_end_of_the_program(silent_server: str) -> None:
    code = (
        "from pipelines.tracking.metric_logger import MetricLogger\n"
        f"log = MetricLogger({silent_server!r}, '0' * 32)\n"
        "log.log({'loss': 1.0}, 0)\n"
        "log.close(timeout_s=0.1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = preflight(f"sqlite:///{tmp_path}/mlflow.db")
    with tracked_run(uri, ensure_experiment(uri, "toy"), "r", params={"a": 1}, tags={}) as run_id:
        log = MetricLogger(uri, run_id)
        log.log({"loss": 1.0}, 1)
        log.close()
    assert capfd.readouterr() == ("", "")


def test_the_commit_is_the_checkout_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert tracking.git_commit() is None
    monkeypatch.setenv("CTMSR_COMMIT", "told")
    assert tracking.git_commit() == "told"
    git("init", "--quiet")
    assert tracking.git_commit() == "told"
    (tmp_path / "tracking.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    git("tag", "-a", "v1", "-m", "v1")
    assert tracking.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "tracking.py").write_text("2")
    assert tracking.git_commit() == git("rev-parse", "HEAD") + "-dirty"


class CutOff(BaseHTTPRequestHandler):
    """A server of one registered model, that ends in the middle of its first answers."""

    num_cut = 0

    def do_GET(self) -> None:
        body = json.dumps({"registered_model": {"name": "x"}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        is_cut = type(self).num_cut > 0
        type(self).num_cut -= is_cut
        self.wfile.write(body[: len(body) // 2] if is_cut else body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def cutting() -> Iterator[MlflowClient]:
    """A client of such a server."""
    with HTTPServer(("127.0.0.1", 0), CutOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tracking.connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize("num_cut", [0, 2])
def test_an_answer_that_is_cut_off_is_asked_for_again(cutting: MlflowClient, num_cut: int) -> None:
    CutOff.num_cut = num_cut
    assert tracking.answered(lambda: cutting.get_registered_model("x")).name == "x"
    assert CutOff.num_cut == 0


def test_answers_that_are_always_cut_off_are_an_error(cutting: MlflowClient) -> None:
    CutOff.num_cut = 9
    with pytest.raises(MlflowException, match="Connection broken"):
        tracking.answered(lambda: cutting.get_registered_model("x"))
    assert CutOff.num_cut == 5
