"""Every private name of Ray's, in one place: what it is for, what breaks without it, what was tried.

Tried with Ray 2.60. A name that moves in another release breaks here and nowhere else.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.data
import ray.train
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE as TRAIN_ENV_VARS
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE as TUNE_ENV_VARS

_PAUSE_S = 0.005
_SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


def num_executions(context: Any) -> int:
    """How often the data set of a DataContext has been iterated over, from 0.

    `DataContext._execution_idx` is the counter behind Ray Data's public `reseed_after_execution`, which
    offers a seed and no number. Without it every iteration would give the same samples again. Tried: a new
    data set for each round, which Ray Train's shards cannot take; one data set of all rounds, which Ray Data
    plans at once, 3 ms a block.
    """
    return 0 if context is None else context._execution_idx


class PausedLoop(ExecutionCallback):
    """A pause in each turn of Ray Data's scheduling loop.

    `DataContext.custom_execution_callback_classes` is public, the base class of its members is not. While
    finished blocks wait for a slow trainer, the loop finds them ready and turns at once, thousands of times a
    second: without the pause that takes a third of a core or more, with it a twentieth.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(_PAUSE_S)


def quieten_data() -> None:
    """Only Ray Data's warnings reach the console, and none about progress bars; log files have everything.

    The logger of the progress bars is private. Without this line `enable_progress_bars = False`, which is the
    public way and is set as well, warns that there will be no progress bars.
    """
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def quieten_token_setup() -> None:
    """Ray turns token authentication on by itself; its warning of that is no news to the user.

    The logger is private. Tried: `logging_level` of `ray.init`, which is set after the warning.
    """
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


@contextmanager
def address_known() -> Iterator[None]:
    """Gives Ray Train's helper processes the address of their cluster, for the length of a `with` block.

    The helper that frees the places of workers whose controller died asks Ray's state API, which looks for a
    cluster on the machine and gives up where it finds two. Then a trial that is stopped keeps its places.
    Train copies only the variables in its private list to its processes. Tried:
    `RunConfig(worker_runtime_env=)`, which reaches the workers and not the helper.
    """
    before = os.environ.get("RAY_ADDRESS")
    TRAIN_ENV_VARS.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def keep_secrets_out_of_trials() -> None:
    """Ray Tune copies no credentials from the driver into its trials' runtime_env, which Ray logs.

    The list of what it copies is private, and there is no public setting. Trials have their credentials from
    their nodes, as trainings do.
    """
    TUNE_ENV_VARS.difference_update(_SECRETS)


@contextmanager
def keyboard_interrupt() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt: Ray Train's own handler exits with 0 and outlives its run.

    No private name, but a handler that Ray Train installs and offers no setting for.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        # A trial runs in another thread, without a handler.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
