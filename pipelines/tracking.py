"""Runs, parameters, metrics and pictures in MLflow: the only module that imports mlflow for logging.

The driver owns a run (`tracked_run`) and passes its id down; rank 0 of the workers logs into it
(`MetricLogger`). Before a training starts, an unusable server is an error (`preflight`); once it runs, MLflow
neither blocks a step nor ends the training: what could not be written is counted and named in a warning.
"""

import contextlib
import itertools
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.environment_variables import (
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ctmsr.config import flatten
from ctmsr.errors import TrackingError

MAX_PARAM_CHARS = 500
_SQLITE = "sqlite:///"
_RETRY_EVERY_S = 2
_STEPS_AT_ONCE = 40
"""A request holds at most 1000 points."""
_FINAL_ERRORS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}
"""After these, trying again is of no use."""

logger = logging.getLogger(__name__)


def connect(tracking_uri: str) -> MlflowClient:
    """A client for the runs and models at one address; MLflow's global addresses stay as they are."""
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def preflight(tracking_uri: str) -> str:
    """Checks within seconds that runs can be logged at `tracking_uri`; makes a sqlite file and its folder.

    Call it once, in the driver, before anything costly: several processes that open a new sqlite file at the
    same time break each other's tables, so it is set up here, under a file lock.

    Returns:
        The address to pass on to every process: a sqlite path is made absolute.

    Raises:
        TrackingError: The address is of another kind, or there is nothing usable behind it.
    """
    if tracking_uri.startswith(("http://", "https://")):
        with tracking_errors(f"the MLflow server {tracking_uri} does not answer"), _patience(retries=0):
            connect(tracking_uri).search_experiments(max_results=1)
        return tracking_uri
    path = _sqlite_path(tracking_uri)
    if path is None:
        raise TrackingError(
            "tracking_uri must be http(s)://host:port of an MLflow server or sqlite:///file.db, "
            f"got {tracking_uri!r}."
        )
    with tracking_errors(f"the MLflow database {path} cannot be used"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=60):
            connect(f"{_SQLITE}{path}").search_experiments(max_results=1)
    return f"{_SQLITE}{path}"


def ensure_experiment(tracking_uri: str, name: str, artifact_location: str | None = None) -> str:
    """The id of experiment `name`, made if there is none.

    Args:
        tracking_uri: From `preflight`.
        name: The experiment.
        artifact_location: Folder or URI for a new experiment's files. None leaves the choice to the server;
            for a sqlite file, which would take the current folder, it is `artifacts` beside the file.

    Raises:
        TrackingError: The experiment is deleted, or MLflow fails.
    """
    client = connect(tracking_uri)
    path = _sqlite_path(tracking_uri)
    if artifact_location is None and path is not None:
        artifact_location = (path.parent / "artifacts").as_uri()
    with tracking_errors(f"cannot open the MLflow experiment {name!r}"):
        try:
            return client.create_experiment(name, artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        existing = client.get_experiment_by_name(name)
    assert existing is not None
    if existing.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name!r} (id {existing.experiment_id}) is deleted. Restore it with "
            f"`mlflow experiments restore -x {existing.experiment_id}`, or name another."
        )
    return existing.experiment_id


@contextlib.contextmanager
def tracked_run(
    tracking_uri: str,
    experiment_id: str,
    run_name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent_run_id: str | None = None,
    run_id: str | None = None,
) -> Iterator[str]:
    """An MLflow run for the length of a `with` block; it ends FINISHED, FAILED, or KILLED on an interrupt.

    Args:
        tracking_uri: From `preflight`.
        experiment_id: From `ensure_experiment`.
        run_name: Shown in MLflow.
        params: The resolved config, nested; logged as dotted parameters, cut to MAX_PARAM_CHARS, and whole as
            config.json.
        tags: Anything to find the run by.
        parent_run_id: The search that this run is a trial of.
        run_id: A run to go on with, whose params stay; None makes a new one.

    Yields:
        The run id.

    Raises:
        TrackingError: The run cannot be started. Once it has started, a dead server is only warned about.
    """
    client = connect(tracking_uri)
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    commit = git_commit()
    source = {"mlflow.source.git.commit": commit} if commit else {}
    cannot_start = f"cannot start the MLflow run {run_name!r}"
    tags = {**source, **tags, **parent}
    with tracking_errors(cannot_start):
        if run_id is None:
            run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
            is_new = True
        else:
            client.update_run(run_id, status="RUNNING")
            is_new = False
    status = "FAILED"
    try:
        with tracking_errors(cannot_start):
            if is_new:
                _log_params(client, run_id, params)
            client.log_dict(run_id, dict(params), "config.json")
        yield run_id
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        try:
            with _patience(retries=3):
                client.set_terminated(run_id, status)
        except (MlflowException, SQLAlchemyError) as error:
            logger.warning(
                "MLflow still shows run %s as running, it is %s: %s", run_id, status, _short(error)
            )


def find_run(tracking_uri: str, experiment_id: str, tags: Mapping[str, str]) -> str | None:
    """Id of the latest run that has all these tags; None if there is none.

    Raises:
        TrackingError: MLflow fails.
    """
    condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    with tracking_errors("cannot look for the MLflow run to go on with"):
        found = connect(tracking_uri).search_runs([experiment_id], condition, max_results=1)
    return found[0].info.run_id if found else None


def finish_children(
    tracking_uri: str, experiment_id: str, parent_run_id: str, failed: Callable[[str], bool]
) -> None:
    """Marks the runs below a parent FINISHED, but those whose name `failed` knows.

    A scheduler stops a trial with its process: the run's own end is then RUNNING or FAILED, by chance.
    """
    client = connect(tracking_uri)
    try:
        for run in client.search_runs([experiment_id], f"tags.mlflow.parentRunId = '{parent_run_id}'"):
            if not failed(run.info.run_name):
                client.set_terminated(run.info.run_id)
    except (MlflowException, SQLAlchemyError) as error:
        logger.warning("MLflow shows a wrong status for stopped trials: %s", _short(error))


def log_files(tracking_uri: str, run_id: str, files: Mapping[str, bytes]) -> None:
    """Stores files with a run, by name; that MLflow does not take them is only warned about."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            connect(tracking_uri).log_artifacts(run_id, folder)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        logger.warning("MLflow has not taken %s: %s", ", ".join(files), _short(error))


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    flat = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in flatten(params).items()]
    for start in range(0, len(flat), 100):  # the most that a server takes at once
        client.log_batch(run_id, params=flat[start : start + 100])


@dataclass(frozen=True)
class _Write:
    """Something that MLflow is to take: points of one step, or a picture."""

    what: str
    points: tuple[Metric, ...] = ()
    image: Callable[[], object] | None = None


class MetricLogger:
    """Writes metrics and pictures of one run in a background thread: a call returns at once.

    The thread keeps the order. While the server is away, it goes on trying, for as long as the run lasts, and
    what waits is held in memory; `unsent` is what a checkpoint should hold of it.
    """

    def __init__(self, tracking_uri: str, run_id: str, unsent: Sequence[Mapping[str, Any]] = ()) -> None:
        """`unsent` is what an earlier logger of the run had not written."""
        self._client = connect(tracking_uri)
        self._run_id = run_id
        self._waiting: deque[_Write] = deque()  # the first is being written
        self._changed = threading.Condition()
        self._is_closed = False
        self._lost: list[str] = []
        for known in unsent:
            self._submit(_points(known["metrics"], known["step"], known["timestamp"]))
        # not an executor: the interpreter would wait for its thread, minutes if the server is dead
        self._thread = threading.Thread(target=self._write_all, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues one point per metric, stamped with the present time."""
        self._submit(_points(metrics, step, int(time.time() * 1000)))

    def image(self, image_u8: np.ndarray, key: str, step: int) -> None:
        """Queues a uint8 HWC picture; MLflow shows the pictures of one key with a slider over the steps."""
        write = partial(self._client.log_image, self._run_id, image_u8, key=key, step=step)
        self._submit(_Write(f"picture {key} of step {step}", image=write))

    def unsent(self) -> list[dict[str, Any]]:
        """Points that are not written yet, as JSON types. Pictures are not among them."""
        with self._changed:
            waiting = [write.points for write in self._waiting if write.points]
        return [
            {
                "step": points[0].step,
                "timestamp": points[0].timestamp,
                "metrics": {point.key: point.value for point in points},
            }
            for points in waiting
        ]

    def close(self, timeout_s: float = 60) -> list[str]:
        """Waits until everything is written, at most `timeout_s`.

        Returns:
            What was lost: each call to `log` or `image`, with the reason.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            return [*self._lost, *(f"{write.what}: not written in time" for write in self._waiting)]

    def _submit(self, write: _Write) -> None:
        with self._changed:
            self._waiting.append(write)
            self._changed.notify_all()

    def _write_all(self) -> None:
        while writes := self._next():
            error = self._write(writes)
            if error is not None and error.error_code not in _FINAL_ERRORS:
                with self._changed:
                    self._changed.wait_for(lambda: False, _RETRY_EVERY_S)
                continue
            with self._changed:
                for write in writes:
                    self._waiting.popleft()
                    if error is not None:
                        self._lost.append(f"{write.what}: {_short(error)}")

    def _next(self) -> list[_Write]:
        """What to write next: one picture, or the points of many steps; nothing when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            points = list(itertools.takewhile(lambda write: write.points, self._waiting))
            return points[:_STEPS_AT_ONCE] or list(itertools.islice(self._waiting, 1))

    def _write(self, writes: list[_Write]) -> MlflowException | None:
        try:
            if writes[0].image:
                writes[0].image()
            else:
                points = [point for write in writes for point in write.points]
                self._client.log_batch(self._run_id, points)
        except MlflowException as error:
            return error
        except (SQLAlchemyError, OSError) as error:
            return MlflowException(_short(error))
        return None


def _points(metrics: Mapping[str, float], step: int, timestamp: int) -> _Write:
    points = (Metric(name, float(value), timestamp, step) for name, value in metrics.items())
    return _Write(f"metrics of step {step}", tuple(points))


def git_commit() -> str | None:
    """Hash of the checkout this file is in, with "-dirty" where files differ; None outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


@contextlib.contextmanager
def tracking_errors(what: str) -> Iterator[None]:
    """Turns the errors of MLflow and its storage into a TrackingError that starts with `what`."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise TrackingError(f"{what}: {_short(error)}. Check tracking_uri and what runs there.") from error


@contextlib.contextmanager
def _patience(*, retries: int) -> Iterator[None]:
    """Shortens how long MLflow waits for a silent server: by default 4 minutes of retries."""
    settings = {MLFLOW_HTTP_REQUEST_MAX_RETRIES.name: str(retries), MLFLOW_HTTP_REQUEST_TIMEOUT.name: "4"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _sqlite_path(tracking_uri: str) -> Path | None:
    """The absolute path in a sqlite URI; None for anything else."""
    path = tracking_uri.removeprefix(_SQLITE)
    return Path(path).absolute() if path and path != tracking_uri else None


def _short(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
