"""Real Ray nodes on this machine, as many as a test needs, on loopback addresses or in network namespaces.

A node is `ray start --block` with all its processes. It can be killed as if its machine had lost power; in a
namespace it can also be cut off as if its cable had been pulled.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.child import Child
from tests.support.repository import ROOT

_OBJECT_STORE_BYTES = 300_000_000
_FAST_HEALTH_CHECKS = {  # notices a dead node after about 4 s instead of 50
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
TRAIN_WORKER = "ray::RayTrainWorker"
"""Start of the command line of a Ray Train worker."""


@dataclass(frozen=True)
class Place:
    """Where a node runs."""

    address: str
    enter: tuple[str, ...] = ()
    """Prefix that makes a command run there."""
    env: Mapping[str, str] = field(default_factory=dict)


def loopback(number: int) -> Place:
    """A loopback address as a place. Number 1 does not work: Ray replaces it with another address."""
    return Place(f"127.0.0.{number}", env={"GLOO_SOCKET_IFNAME": "lo"})


class RayNodes:
    """A Ray cluster of a head and of nodes that come and go; leaves no process behind."""

    def __init__(
        self, folder: Path, *, num_cpus: int, env: Mapping[str, str], place: Place | None = None
    ) -> None:
        """Does not start anything yet.

        Args:
            folder: For the logs of the nodes.
            num_cpus: Logical CPUs of the head.
            env: Variables for all nodes and the driver, on top of this process's environment.
            place: Where the head runs; a loopback address if None.
        """
        self._folder, self._num_cpus = folder, num_cpus
        self._place = place or loopback(2)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ours = {
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # by default, everything else on this machine has priority
            "OMP_NUM_THREADS": "1",  # threads waiting for each other slow everything down
        }
        self._env = dict(os.environ) | ours | token | dict(env)
        self._env.pop("RAY_ADDRESS", None)
        self._numbers = count(3)
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with self._exit:
            # not in pytest's folder: paths of Unix sockets must be short
            scratch = self._exit.enter_context(
                tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
            )
            port, *others = (free_port() for _ in range(3))
            self.address = f"{self._place.address}:{port}"
            self.head = self._start(
                self._place,
                self._num_cpus,
                _FAST_HEALTH_CHECKS,
                "--head",
                f"--port={port}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={others[0]}",
                f"--ray-client-server-port={others[1]}",
                f"--temp-dir={scratch}",
            )
            self._exit = self._exit.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def driver_env(self) -> dict[str, str]:
        """Environment of a command that runs on the head and uses the cluster."""
        return self._env | dict(self._place.env) | {"RAY_ADDRESS": self.address}

    def add(
        self, num_cpus: int, *, place: Place | None = None, env: Mapping[str, str] | None = None
    ) -> Child:
        """Starts another node, at a new loopback address if `place` is None, and returns once it has joined.

        Killing the returned child is like a loss of power: no process of the node can send a last message.
        """
        where = place or loopback(next(self._numbers))
        return self._start(where, num_cpus, env or {}, f"--address={self.address}")

    def _start(self, place: Place, num_cpus: int, env: Mapping[str, str], *options: str) -> Child:
        command = [
            *place.enter,
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *options,
            f"--node-ip-address={place.address}",
            f"--num-cpus={num_cpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        node = Child(
            command, self._env | dict(place.env) | dict(env), self._folder / f"node-{place.address}.log"
        )
        self._exit.enter_context(node)
        node.wait_until_printed("Ray runtime started")
        return node


@dataclass(frozen=True)
class Link:
    """Two network namespaces that see only each other; this process can also reach the first."""

    first: Place
    second: Place
    first_from_outside: str
    """Address of the first namespace as seen from this process."""
    _second_name: str

    def cut(self) -> None:
        """Takes the link between the two down: packets are lost silently."""
        _ip("-n", self._second_name, "link", "set", "wire", "down")


@contextmanager
def linked_namespaces() -> Iterator[Link]:
    """A link for the duration of a `with` block.

    Raises:
        RuntimeError: This process is not root, or iproute2 is not installed.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise RuntimeError(
            "network namespaces need root and iproute2. Run `make test-nodes` as root, after "
            "`apt-get install --no-install-recommends iproute2`."
        )
    mark = secrets.token_hex(3)
    names = (f"first-{mark}", f"second-{mark}")
    with ExitStack() as undo:
        for name in names:
            _ip("netns", "add", name)
            undo.callback(_ip, "netns", "delete", name)
            _ip("-n", name, "link", "set", "lo", "up")
        first, second = names
        _ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "name", "wire", "netns", second)
        _ip("link", "add", f"out-{mark}", "type", "veth", "peer", "name", "out", "netns", first)
        undo.callback(
            _ip, "link", "delete", f"out-{mark}"
        )  # before its namespace, which is deleted with a delay
        _ip("-n", first, "address", "add", "10.77.0.1/24", "dev", "wire")
        _ip("-n", second, "address", "add", "10.77.0.2/24", "dev", "wire")
        _ip("-n", first, "address", "add", "10.77.1.1/24", "dev", "out")
        _ip("address", "add", "10.77.1.2/24", "dev", f"out-{mark}")
        for name, device in ((first, "wire"), (second, "wire"), (first, "out")):
            _ip("-n", name, "link", "set", device, "up")
        _ip("link", "set", f"out-{mark}", "up")
        places = [
            Place(f"10.77.0.{number}", ("ip", "netns", "exec", name), {"GLOO_SOCKET_IFNAME": "wire"})
            for number, name in enumerate(names, 1)
        ]
        yield Link(places[0], places[1], first_from_outside="10.77.1.1", _second_name=second)


def free_port() -> int:
    """A free TCP port."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
