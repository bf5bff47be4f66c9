"""Runs, their parameters and files in MLflow.

The driver owns a run (`tracked_run`) and passes its id down; rank 0 of the workers logs to it
(`metric_logger.py`). Before training starts, an unusable server is an error (`preflight`). From then on
MLflow neither blocks a step nor ends the run: writes that are lost are counted and reported in a warning.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock
from google.protobuf.json_format import ParseError
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.environment_variables import (
    MLFLOW_ALLOW_HTTP_REDIRECTS,
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ctmsr.config import flatten
from ctmsr.errors import TrackingError

from ..infra.storage import check_outlives_job

MAX_PARAM_CHARS = 500
_SQLITE = "sqlite:///"
_READ_RETRIES = 3
T = TypeVar("T")

COMMIT_ENV = "CTMSR_COMMIT"
"""Environment variable with the commit, for code without a .git, as in a job or an image."""
logger = logging.getLogger(__name__)


def connect(tracking_uri: str) -> MlflowClient:
    """A client for the runs and models at one address; MLflow's global URIs are left alone."""
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    # A model is code that runs here, so it comes from the server that was named, and from no other.
    os.environ.setdefault(MLFLOW_ALLOW_HTTP_REDIRECTS.name, "false")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def preflight(tracking_uri: str) -> str:
    """Checks within seconds that runs can be logged at `tracking_uri`; creates a sqlite file if need be.

    Call it once, in the driver, before anything expensive. Processes that open a new sqlite file at the same
    time corrupt each other's tables, so it is created here, under a file lock.

    Returns:
        The address to pass on to every process, with a sqlite path made absolute.

    Raises:
        ConfigError: It is a file in the working directory of a job.
        TrackingError: The address is neither a server nor a sqlite file, or cannot be used.
    """
    _refuse_login(tracking_uri)
    check_outlives_job("tracking_uri", tracking_uri)
    if tracking_uri.startswith(("http://", "https://")):
        with tracking_errors(f"the MLflow server {tracking_uri} does not answer"), _patience(retries=0):
            _check_login(tracking_uri)
        return tracking_uri
    path = _sqlite_path(tracking_uri)
    if path is None:
        raise TrackingError(
            "tracking_uri must be http(s)://host:port of an MLflow server or sqlite:///file.db, "
            f"got {tracking_uri!r}."
        )
    if {"%", "?"} & set(str(path)):  # which have a meaning in SQLAlchemy's URLs, and escapes confuse MLflow
        raise TrackingError(
            f"MLflow cannot use the database {path}: its path has a % or ? in it. Set tracking_uri to "
            "another path, such as sqlite:////home/me/mlflow.db, or rename the folder."
        )
    with tracking_errors(f"the MLflow database {path} cannot be used"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=60):
            connect(f"{_SQLITE}{path}").search_experiments(max_results=1)
    return f"{_SQLITE}{path}"


def _check_login(server: str) -> None:
    try:
        connect(server).search_experiments(max_results=1)
    except MlflowException as error:
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise
        raise TrackingError(
            f"the MLflow server {server} refuses the login. Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD to a valid one."
        ) from error


def ensure_experiment(tracking_uri: str, name: str, artifact_location: str | None = None) -> str:
    """The id of experiment `name`, which is created if there is none.

    Args:
        tracking_uri: From `preflight`.
        name: The experiment.
        artifact_location: Folder or URI for a new experiment's files. None leaves the choice to the server
            or, for a sqlite file, means `artifacts` beside it; MLflow would use the current folder.

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
    shown: Mapping[str, Any] | None = None,
    parent_run_id: str | None = None,
    run_id: str | None = None,
) -> Iterator[str]:
    """An MLflow run for the duration of a `with` block; ends as FINISHED, FAILED or, if interrupted, KILLED.

    Args:
        tracking_uri: From `preflight`.
        experiment_id: From `ensure_experiment`.
        run_name: Shown in MLflow.
        params: The resolved config, nested; logged as dotted parameters, truncated to MAX_PARAM_CHARS, and in
            full as config.json.
        shown: Logged as parameters instead: what tells the trials of a search apart.
        tags: Anything to find the run by.
        parent_run_id: The search that this run is a trial of.
        run_id: An existing run to resume, which keeps its params; None creates a new one.

    Yields:
        The run id.

    Raises:
        TrackingError: The run cannot be started. Later failures of the server are only logged.
    """
    client = connect(tracking_uri)
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    commit = git_commit()
    source = {"mlflow.source.git.commit": commit} if commit else {}
    cannot_start = f"cannot start the MLflow run {run_name!r}"
    tags = {**source, **tags, **parent}
    is_new = run_id is None
    with tracking_errors(cannot_start):
        if run_id is None:
            run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
        else:
            client.update_run(run_id, status="RUNNING")
    status = "FAILED"
    try:
        with tracking_errors(cannot_start):
            if is_new:
                _log_params(client, run_id, params if shown is None else shown)
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
                "MLflow still shows run %s as running, but it is %s: %s", run_id, status, first_line(error)
            )


def find_run(tracking_uri: str, experiment_id: str, tags: Mapping[str, str]) -> str | None:
    """Id of the latest run that has all these tags; None if there is none.

    Raises:
        TrackingError: MLflow fails.
    """
    quoted = {name: f'"{value}"' if "'" in value else f"'{value}'" for name, value in tags.items()}
    condition = " and ".join(f"tags.`{name}` = {value}" for name, value in quoted.items())
    with tracking_errors("cannot look up the MLflow run to resume"):
        found = connect(tracking_uri).search_runs([experiment_id], condition, max_results=1)
    return found[0].info.run_id if found else None


def finish_children(
    tracking_uri: str,
    experiment_id: str,
    parent_run_id: str,
    failed: Callable[[str], bool],
    objectives: Mapping[str, tuple[float, int]],
) -> None:
    """Marks the runs below a parent as FINISHED, except those whose name `failed` accepts.

    A scheduler stops a trial by killing its process, which leaves its run RUNNING or FAILED, by chance.
    `objectives`, each with its step, by name of the run, become the metric "objective", as of the parent.
    """
    client = connect(tracking_uri)
    try:
        for run in client.search_runs([experiment_id], f"tags.mlflow.parentRunId = '{parent_run_id}'"):
            if not failed(run.info.run_name):
                client.set_terminated(run.info.run_id)
            if run.info.run_name in objectives:
                value, step = objectives[run.info.run_name]
                client.log_metric(run.info.run_id, "objective", value, step=step)
    except (MlflowException, SQLAlchemyError) as error:
        logger.warning("MLflow shows a wrong status for stopped trials: %s", first_line(error))


def log_files(tracking_uri: str, run_id: str, files: Mapping[str, bytes]) -> None:
    """Stores files with a run, by name; if MLflow fails, only logs a warning."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            connect(tracking_uri).log_artifacts(run_id, folder)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        logger.warning("MLflow did not accept %s: %s", ", ".join(files), first_line(error))


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    flat = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in flatten(params).items()]
    for start in range(0, len(flat), 100):  # the most that a server accepts at once
        client.log_batch(run_id, params=flat[start : start + 100])


def git_commit() -> str | None:
    """Hash of the checkout that contains this file, with "-dirty" appended if files have changed.

    Outside a checkout, as in a job, the value of CTMSR_COMMIT, or None.
    """
    declared = os.environ.get(COMMIT_ENV) or None
    git = shutil.which("git")
    if git is None:
        return declared
    command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else declared


def answered(ask: Callable[[], T]) -> T:
    """The result of a read request, repeated if the connection broke in the middle of the response.

    MLflow's own client retries only until a response begins.
    """
    for _ in range(_READ_RETRIES):
        try:
            return ask()
        except MlflowException as error:
            if "Connection broken" not in str(error):
                raise
    return ask()


@contextlib.contextmanager
def tracking_errors(what: str) -> Iterator[None]:
    """Turns the errors of MLflow and its storage into a TrackingError that starts with `what`."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ParseError) as error:
        raise TrackingError(
            f"{what}: {first_line(error)}. Check tracking_uri and the server behind it."
        ) from error


@contextlib.contextmanager
def _patience(*, retries: int) -> Iterator[None]:
    """Makes MLflow give up early on a silent server, instead of retrying for its default of 4 minutes."""
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


def _refuse_login(tracking_uri: str) -> None:
    """Rejects a password in the address, which is written to configs, checkpoints, MLflow and logs."""
    if "@" in urlsplit(tracking_uri).netloc:
        raise TrackingError(
            "tracking_uri has a login in it (user:password@), which would be written to configs, "
            "checkpoints and MLflow. Set it to http(s)://host:port, and export MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD."
        )


def is_there(tracking_uri: str) -> bool:
    """Whether something was ever logged at an address: a server, or a sqlite file that exists."""
    path = _sqlite_path(tracking_uri)
    return path is None or path.exists()


def _sqlite_path(tracking_uri: str) -> Path | None:
    """The absolute path in a sqlite URI; None for anything else."""
    path = tracking_uri.removeprefix(_SQLITE)
    return Path(path).expanduser().absolute() if path and path != tracking_uri else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
