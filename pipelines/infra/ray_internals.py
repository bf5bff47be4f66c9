"""Everything this project uses of Ray that Ray does not document, in one place.

For each item: what it is for, what breaks without it, and which public way was ruled out. Checked against
Ray 2.59 and 2.60. If a release renames one of them, this is the only file to change; until then, everything
works without it, and one warning says what is lost.
"""

import functools
import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train

from .storage import open_uri, storage_errors

logger = logging.getLogger(__name__)

_PAUSE_S = 0.005
_SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


@functools.cache  # so that a warning is given once
def private(module: str, name: str, lost: str) -> Any:
    """A name that Ray does not document; None, with a warning, if this release of Ray has no such name.

    Args:
        module: Where it is.
        name: In the module.
        lost: What does not work without it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        logger.warning("Ray %s: %s. %s Please report this.", ray.__version__, error, lost)
        return None


class LoopThrottle:
    """Sleeps briefly on every iteration of Ray Data's scheduling loop.

    While finished blocks wait for a slow trainer, the loop spins thousands of times a second. Unthrottled it
    takes a third of a core or more; throttled, a twentieth.

    `DataContext.custom_execution_callback_classes` is public, but `ray.data` does not export the base class
    of its members. Here all its methods but one do nothing, those that a later release adds as well.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(_PAUSE_S)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_: None


def quieten_data() -> None:
    """Limits Ray Data's console output to warnings, without the one about disabled progress bars.

    The parent logger `ray.data` is public, the logger of the progress bars is not. Disabling the bars the
    public way, with `enable_progress_bars = False`, logs a warning that they are disabled. Also public is
    `ray.util.debug.disable_log_once_globally()`, which would hide every other one-time warning as well.
    """
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def quieten_token_setup() -> None:
    """Hides the warning that Ray has turned on token authentication for a private cluster.

    The logger is private. `RAY_AUTH_MODE=token` in the environment avoids the warning, but only if it is set
    before Ray is imported. `logging_level` and `logging_config` of `ray.init` would hide Ray's other warnings
    too.
    """
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


@contextmanager
def train_helpers_find_cluster() -> Iterator[None]:
    """Passes the cluster's address to Ray Train's helper processes for the duration of a `with` block.

    When a training's controller dies, for instance because a trial is stopped, a helper releases the
    resources of its workers. To learn of the death it queries Ray's state API, which without an address looks
    for a cluster on the machine: if there are two, it picks the wrong one or fails, and the workers'
    resources are never released.

    Train copies only the variables in a private set to its controller, from which the helper inherits them.
    `RunConfig(worker_runtime_env=)` reaches the workers but not the helper, and the `runtime_env` of
    `ray.init` has to be given before a private cluster has an address.
    """
    before = os.environ.get("RAY_ADDRESS")
    passed_on = private(
        "ray.train.v2._internal.constants",
        "ENV_VARS_TO_PROPAGATE",
        "With two clusters on a machine, a stopped trial may keep its resources.",
    )
    if passed_on is not None:
        passed_on.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def forget_lost_checkpoints(run_uri: str) -> None:
    """Deletes Ray Train's list of a run's checkpoints if it names one that is gone, or does not read.

    With such a list Ray Train refuses to start, although a run resumes from what is in storage, not from the
    list. Checkpoints are gone when somebody has made room, and a list of another release may not read. Ray's
    public `Result.from_path` finds out, but the error's class and the name of the file are private.
    """
    file_system, folder = open_uri(run_uri)
    try:
        ray.train.Result.from_path(folder, file_system)
    except RuntimeError:
        return  # there is no list
    except Exception as error:
        if type(error).__name__ != "CheckpointManagerInitializationError":
            raise
        with storage_errors(run_uri):
            file_system.delete_file(f"{folder}/checkpoint_manager_snapshot.json")


def keep_secrets_out_of_trials() -> None:
    """Stops Ray Tune from copying the driver's AWS credentials into its trials' runtime_env, which Ray logs.

    The set of variables that Tune copies is private, and no public setting changes it. Trials get their
    credentials from the environment of their nodes, like any training.
    """
    copied = private(
        "ray.tune.execution.class_cache",
        "ENV_VARS_TO_PROPAGATE",
        "AWS credentials in this environment may get into the logs of a search: use a profile or a role.",
    )
    if copied is not None:
        copied.difference_update(_SECRETS)


@contextmanager
def keyboard_interrupt() -> Iterator[None]:
    """Keeps Ctrl-C a KeyboardInterrupt while Ray Train runs, and restores the SIGINT handler afterwards.

    Nothing private here, but Ray Train has no setting for the handler it installs: one that may exit with
    status 0 and stays in place after the run.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        # A trial runs outside the main thread, where handlers can be neither installed nor restored.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
