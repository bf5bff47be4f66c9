"""Real servers as separate processes that can be killed and restarted: moto's S3, and MLflow."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.child import Child
from tests.support.servers.ray_nodes import free_port


class Server:
    """A command that listens on a port, for the duration of a `with` block."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        ready: str,
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Does not start it yet. The command prints `ready` once it listens."""
        self._command, self._ready, self._log = command, ready, log
        self._env = dict(os.environ) | dict(env or {})
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Starts it, or restarts it after `kill`, and returns once it listens."""
        self._child = Child(self._command, self._env, self._log)
        try:
            self._child.wait_until_printed(self._ready)
        except BaseException:
            self._child.kill()
            raise

    def kill(self) -> None:
        """Kills it."""
        self._child.kill()


def s3_server(folder: Path, *, host: str = "127.0.0.1", enter: tuple[str, ...] = ()) -> Server:
    """An S3 server in memory that accepts any credentials; `enter` is a prefix such as `ip netns exec`."""
    port = free_port()
    command = [*enter, sys.executable, "-m", "moto.server", "--host", host, "--port", str(port)]
    return Server(command, port, ready="Running on", log=folder / "s3.log")


def mlflow_server(folder: Path, *, backend_uri: str | None = None, artifacts: str | None = None) -> Server:
    """An MLflow server that also serves artifacts.

    Args:
        folder: For its log and, where the other arguments are None, its database and artifacts.
        backend_uri: URI of its database.
        artifacts: Folder or s3:// URI that only the server accesses.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", backend_uri or f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", artifacts or str(folder / "artifacts")),
    ]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return Server(command, port, ready="Application startup complete", log=folder / "mlflow.log", env=env)
