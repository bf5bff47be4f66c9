"""Runs the application on Ray Serve for as long as a command lasts."""

import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from ctmsr.errors import UserError

from ..infra.cluster import ray_cluster
from ..tracking.released import Released
from .application import QUIET, Arguments, build
from .guard import PROXY_ENV

_SPARE_S = 30
"""Ray's own time limit comes after that of the application, whose answer says more."""
_KEEP_ALIVE_S = 10
_NAME = "upscale"


@contextmanager
def serving(arguments: Arguments, found: Released, *, host: str, port: int) -> Iterator[str]:
    """A running server for the duration of a `with` block; yields its address.

    The guard runs in the proxy if this starts Ray, or if `PROXY_ENV` was set when Ray was started.

    Args:
        arguments: What to serve, and how.
        found: The model that it starts with.
        host: Address to listen on, of the cluster's head node.
        port: Port to listen on.

    Raises:
        UserError: The port is taken, the cluster runs Ray Serve already, or the model cannot be served.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for name, value in PROXY_ENV.items():
        os.environ.setdefault(name, value)
    with _own_port(host, port), ray_cluster():
        if serve.status().proxies:
            raise UserError(
                "Ray Serve already runs on this cluster, on a port of its own. Add the model to its config "
                "file, with import_path pipelines.serve:app, and run `serve deploy`."
            )
        application = build(arguments, found)
        options = HTTPOptions(
            host=host,
            port=port,
            request_timeout_s=arguments.timeout + _SPARE_S,
            keep_alive_timeout_s=_KEEP_ALIVE_S,
        )
        try:
            serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=QUIET)
            _deploy(application, found)
            yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        finally:
            serve.shutdown()


def _deploy(application: serve.Application, found: Released) -> None:
    try:
        serve.run(application, name=_NAME)
    except RuntimeError as error:
        raise UserError(f"Ray Serve cannot start {found.uri}: {_reason(error)}") from error


def _reason(error: RuntimeError) -> str:
    """The last error in the tracebacks of the replicas, which Ray keeps with the state of the deployments."""
    application = serve.status().applications.get(_NAME)
    replicas = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line.strip() for text in (str(error), *replicas) for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines or ["no reason given"])[-1]


@contextmanager
def _own_port(host: str, port: int) -> Iterator[None]:
    """Keeps other servers from a port for the duration of a `with` block.

    Fails at once if the port is taken; Ray Serve itself would keep retrying. Two servers of a user that start
    together would share it, as Ray's proxies set SO_REUSEPORT; so there is a lock as well.
    """
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        yield  # the port is on another machine
        return
    lock = FileLock(Path(tempfile.gettempdir(), f"ctmsr-serve-{os.getuid()}-{port}.lock"), timeout=0)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
        lock.acquire()
    except OSError as error:  # of which Timeout is one
        raise UserError(
            f"cannot listen on {host}, port {port} ({error}). Choose others with --host and --port."
        ) from error
    try:
        yield
    finally:
        lock.release()
