"""The Ray cluster a command runs on: the one at RAY_ADDRESS, or else a private one on this machine."""

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
from .s3 import STORAGE_ENV

_RAY_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # with the handler, a search stopped by Ctrl-C looks finished
    # Past this number Ray warns about every new worker process, and a search needs dozens of idle ones.
    "RAY_worker_maximum_startup_concurrency": "64",
    # Ray Train's `report` waits for its controller's next poll: 2 s apart by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # How long an elastic run waits for a replacement of a lost node: a minute by default.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}

_PRIVATE_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""A private cluster is never preempted, and the watcher costs a process."""

_SHARED_ENV = {"RAY_gcs_server_port_wait_time_s": "3"}
"""A cluster that answers but rejects the connection expects another token; Ray would retry for 20 s."""

_MIN_CPUS = 4
"""Fewest CPUs to declare for a private cluster: on a two-core machine, workers and data tasks share them."""


def check_gpus(num_workers: int, *, use_gpu: bool) -> None:
    """Fails early where Ray would wait forever for GPUs that a private cluster will never have.

    A shared cluster is not checked, as it may still grow.

    Raises:
        ConfigError: This machine has fewer than `num_workers` GPUs.
    """
    private = not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "local") == "local"
    found = torch.cuda.device_count()
    check(
        not (use_gpu and private) or found >= num_workers,
        f"train.use_gpu with train.num_workers={num_workers} needs as many GPUs, and this machine has "
        f"{found}. Set train.use_gpu=false, fewer workers, or RAY_ADDRESS to a cluster that has them.",
    )


def _check_reachable(address: str) -> None:
    """Fails within seconds; Ray itself would retry for minutes."""
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
    """Connects to Ray for the duration of a `with` block; an existing connection is left alone."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    for name, value in (_RAY_ENV | (_PRIVATE_ENV if address == "local" else _SHARED_ENV)).items():
        os.environ.setdefault(name, value)
    quieten_token_setup()
    _check_reachable(address)
    is_here = address == "local"
    print("starting Ray on this machine" if is_here else f"connecting to Ray at {address}", flush=True)
    _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    try:
        ray.init(
            address=address,
            num_cpus=max(_MIN_CPUS, os.cpu_count() or 1) if address == "local" else None,
            include_dashboard=True if address == "local" else None,  # Tune over Train needs it
            log_to_driver=False,
            logging_level=logging.WARNING,
            logging_config=ray.LoggingConfig(log_level="WARNING"),
            runtime_env={"env_vars": STORAGE_ENV},
        )
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        details = f"{error!r} {error.__cause__}"  # Ray wraps the original error as text
        if "AuthenticationError" not in details:
            raise
        raise UserError(
            f"the Ray cluster at RAY_ADDRESS={address} requires a token, and this one is missing or wrong. "
            "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
        ) from error
