"""The Ray cluster that a command runs on: the one RAY_ADDRESS names, else a private one on this machine."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch

from ctmsr.config import check
from ctmsr.errors import UserError

from .ray_internals import quieten_token_setup
from .storage import STORAGE_ENV

_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else a search ends on Ctrl-C as if it had finished
    # Ray warns at every further worker process past this number, though a search needs dozens of idle ones.
    "RAY_worker_maximum_startup_concurrency": "64",
    # Ray Train's `report` waits for its controller's next poll: 2 s apart by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # How long an elastic run waits for a lost node's place to be filled: a minute by default.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}

_ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""On this machine alone nobody gives notice, and the watcher is one more process."""

_ELSEWHERE = {"RAY_gcs_server_port_wait_time_s": "3"}
"""A cluster that answers and still refuses wants another token: Ray would ask it for 20 s."""

_LEAST_CPUS = 4
"""CPUs of a private cluster at least: where there are two, workers and data tasks have to share them."""


def check_gpus(num_workers: int, *, use_gpu: bool) -> None:
    """Ray would wait for ever for GPUs that a private cluster cannot get; another cluster may yet grow.

    Raises:
        ConfigError: This machine has fewer than `num_workers`.
    """
    private = not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "local") == "local"
    found = torch.cuda.device_count()
    check(
        not (use_gpu and private) or found >= num_workers,
        f"train.use_gpu with train.num_workers={num_workers} needs as many GPUs, and this machine has "
        f"{found}. Set train.use_gpu=false, fewer workers, or RAY_ADDRESS to a cluster that has them.",
    )


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:  # "local" and "auto" name no host
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}). Start one, correct the address, or "
            "unset RAY_ADDRESS to use this machine alone."
        ) from error


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connects for the length of a `with` block; if Ray is connected already, it is left as it is."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    for name, value in (_QUIET | (_ALONE if address == "local" else _ELSEWHERE)).items():
        os.environ.setdefault(name, value)
    quieten_token_setup()
    _check_reachable(address)
    _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    try:
        ray.init(
            address=address,
            num_cpus=max(_LEAST_CPUS, os.cpu_count() or 1) if address == "local" else None,
            include_dashboard=True if address == "local" else None,  # Tune over Train needs it
            log_to_driver=False,
            logging_level=logging.WARNING,
            logging_config=ray.LoggingConfig(log_level="WARNING"),
            runtime_env={"env_vars": STORAGE_ENV},
        )
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        said = f"{error!r} {error.__cause__}"  # Ray wraps it, as text
        if "AuthenticationError" not in said:
            raise
        raise UserError(
            f"the Ray cluster at RAY_ADDRESS={address} wants a token, and was given none or another one. "
            "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
        ) from error
