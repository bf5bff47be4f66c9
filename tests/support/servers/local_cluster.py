"""`python -m cluster.local` as a user runs it: its commands, the variables it prints, and jobs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.repository import ROOT
from tests.support.servers.ray_nodes import free_port


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster."""

    folder: Path
    printed: str
    """Output of `up`."""
    env: Mapping[str, str]
    """Environment of a shell in which the printed lines of `up` have been run."""

    @property
    def ray_folder(self) -> Path:
        """Where Ray keeps its logs."""
        return Path(json.loads((self.folder / "cluster.json").read_text())["ray_folder"])

    def ray(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """The command `ray`, in the shell's environment or another."""
        return _run(["-m", "ray.scripts.scripts", *arguments], self.env if env is None else env)

    def submit(self, *command: str, **env_vars: str) -> str:
        """Runs a command as a job, which must succeed; returns its output."""
        environment = json.dumps({"env_vars": env_vars})
        options = ["--working-dir", ".", "--runtime-env-json", environment]
        done = self.ray("job", "submit", *options, "--", *command)
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        assert "succeeded" in printed
        return printed


def local(
    command: str, folder: Path, *options: str, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """`python -m cluster.local COMMAND`."""
    return _run(["-m", "cluster.local", command, "--folder", str(folder), *options], env)


@contextmanager
def local_cluster(
    folder: Path, *, num_nodes: int, cpus: int, env: Mapping[str, str]
) -> Iterator[LocalCluster]:
    """A cluster for the duration of a `with` block.

    Args:
        folder: For `--folder`; its parent exists.
        num_nodes: Number of nodes.
        cpus: CPUs per node.
        env: Environment of the shell that runs the commands.
    """
    ports = ["--port", str(free_port()), "--dashboard-port", str(free_port())]
    try:
        done = local("up", folder, "--nodes", str(num_nodes), "--cpus", str(cpus), *ports, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        yield LocalCluster(folder, done.stdout + done.stderr, _after_running(done.stdout, env))
    finally:
        done = local("down", folder, env=env)
        assert done.returncode == 0, done.stdout + done.stderr


def shell_env(**planted: str) -> dict[str, str]:
    """The environment of a shell that knows of no cluster, with further variables that a user has exported.

    It lacks PYTHONPATH, so that a job runs the code sent with it.
    """
    taken = ("RAY_", "PYTHONPATH", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    return env | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"} | planted


def _after_running(printed: str, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a shell that has run the printed lines."""
    env = dict(env)
    for line in printed.splitlines():
        command, _, rest = line.partition(" ")
        if command == "export":
            name, _, value = rest.partition("=")
            env[name] = value
        elif command == "unset":
            env.pop(rest, None)
    return env


def _run(arguments: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=dict(env), capture_output=True, text=True, check=False
    )
