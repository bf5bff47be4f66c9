"""Runs a server for one model on Ray Serve."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from ctmsr.errors import UserError

from ..infra.cluster import ray_cluster
from ..tracking.released import Released
from .server import Limits, Server

_MAX_REQUESTS = 64
"""Requests that a replica handles at a time: the page must load while pictures wait."""


@contextmanager
def serving(model: Released, *, host: str, port: int, limits: Limits) -> Iterator[str]:
    """A running server for the duration of a `with` block; yields its address.

    Args:
        model: The model that upscales the pictures.
        host: Address to listen on, of the cluster's head node.
        port: Port to listen on.
        limits: Limits on requests.

    Raises:
        UserError: The port is taken, or the model does not load.
    """
    _check_port(host, port)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ray_cluster():
        has_gpus = model.device in (None, "cuda", "rocm")
        gpus = int(ray.cluster_resources().get("GPU", 0)) if has_gpus else 0
        server = serve.deployment(
            name="server",
            num_replicas=max(1, gpus),
            max_ongoing_requests=_MAX_REQUESTS,
            max_constructor_retry_count=1,
            ray_actor_options={"num_cpus": 1, "num_gpus": min(1, gpus)},
            logging_config=quiet,
        )(Server)
        options = HTTPOptions(host=host, port=port)
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=quiet)
        try:
            _deploy(server.bind(model, limits), model)
            yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        finally:
            serve.shutdown()


def _deploy(application: serve.Application, model: Released) -> None:
    try:
        serve.run(application, name="upscale")
    except RuntimeError as error:  # its text is the traceback of the replica
        said = [line for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"Ray Serve cannot start {model.uri}: {said[-1].strip()}") from error


def _check_port(host: str, port: int) -> None:
    """Fails at once if the port is taken; Ray Serve itself would keep retrying."""
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return  # the port is on another machine
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port} ({error}). Choose others with --host and --port."
        ) from error
