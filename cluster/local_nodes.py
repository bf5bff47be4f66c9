"""Starts, finds and stops the nodes of a local cluster. The cluster's folder contains:

token           readable only by its owner; deleted by `down`
cluster.json    addresses, and the mark by which `down` recognises the cluster's processes
127.0.0.2.log   what `ray start` printed, by node; Ray's own logs are where cluster.json says
"""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ctmsr.config import check
from ctmsr.errors import UserError

TOKEN_FILE, STATE_FILE = "token", "cluster.json"
MARK = "CTMSR_LOCAL_CLUSTER"
"""Environment variable of every process of a cluster, including those of its jobs."""
_START_S = 120
_KILL_S = 30
_OBJECT_STORE_BYTES = 1_000_000_000
_LOG_TAIL_CHARS = 1500


@dataclass(frozen=True)
class Cluster:
    """A cluster started by `up`, as stored in cluster.json."""

    folder: str
    mark: str
    """Value of MARK."""
    port: int
    dashboard_port: int
    cpus: int
    """CPUs per node."""
    ray_folder: str
    """Contains a folder per node for sockets, logs and the code of jobs."""
    pids: dict[str, int] = field(default_factory=dict)
    """Process id of each node's `ray start`, by address."""

    @property
    def address(self) -> str:
        """For drivers: RAY_ADDRESS."""
        return f"{node_address(0)}:{self.port}"

    @property
    def dashboard_url(self) -> str:
        """For jobs: RAY_API_SERVER_ADDRESS."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def token_path(self) -> Path:
        """The file with the token."""
        return Path(self.folder, TOKEN_FILE)

    def save(self) -> None:
        """Writes cluster.json atomically."""
        beside = Path(self.folder, f".{STATE_FILE}")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        beside.replace(Path(self.folder, STATE_FILE))


@dataclass(frozen=True)
class Node:
    """A node that has joined the cluster."""

    address: str
    cpus: int


def node_address(index: int) -> str:
    """The loopback address of a node; not 127.0.0.1, which Ray would replace with another address."""
    return f"127.0.0.{index + 2}"


def up(folder: Path, *, num_nodes: int, cpus: int, port: int, dashboard_port: int) -> Cluster:
    """Starts a cluster and returns once all nodes have joined; if one does not, stops all of them.

    Raises:
        UserError: A cluster is up in the folder, a port is taken, Ray is not installed, or a node fails.
    """
    check(1 <= num_nodes <= 50, f"--nodes must be from 1 to 50, got {num_nodes}.")
    check(cpus >= 1, f"--cpus must be at least 1, got {cpus}.")
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            f"Ray is not installed for {sys.executable}. Run `make setup` and `source .venv/bin/activate`."
        )
    folder = folder.absolute()
    known = load(folder)
    if known and processes(known):
        raise UserError(
            f"a cluster of {len(known.pids)} nodes is up in {folder} (RAY_ADDRESS={known.address}). Use it, "
            f"or stop it first: python -m cluster.local down --folder {folder}"
        )
    _check_free("--port", node_address(0), port)
    _check_free("--dashboard-port", "127.0.0.1", dashboard_port)
    if known:
        down(folder)  # remains of a cluster that ended with its machine
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # not in `folder`: the path of a Unix socket has a length limit
    ray_folder = tempfile.mkdtemp(prefix="ray-")
    cluster = Cluster(str(folder), secrets.token_hex(16), port, dashboard_port, cpus, ray_folder)
    cluster.save()  # before anything starts, as `down` needs the mark
    try:
        _write_token(cluster.token_path)
        _start_nodes(cluster, num_nodes)
    except BaseException:
        down(folder)
        raise
    return cluster


def down(folder: Path) -> int:
    """Kills all processes of the cluster in a folder and deletes its token; returns the number of nodes.

    Raises:
        UserError: Some processes do not end.
    """
    cluster = load(folder)
    if cluster is None:
        return 0
    deadline = time.monotonic() + _KILL_S
    while pids := processes(cluster):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise UserError(f"processes {pids} of the cluster in {folder} do not end. Try again later.")
        time.sleep(0.05)
    shutil.rmtree(cluster.ray_folder, ignore_errors=True)
    cluster.token_path.unlink(missing_ok=True)
    Path(folder, STATE_FILE).unlink(missing_ok=True)
    return len(cluster.pids)


def load(folder: Path) -> Cluster | None:
    """Reads cluster.json of a folder; None if there is none.

    Raises:
        UserError: It is damaged.
    """
    path = Path(folder, STATE_FILE)
    try:
        return Cluster(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}. Delete it once no Ray process is left.") from error


def processes(cluster: Cluster) -> list[int]:
    """Running processes of a cluster: those with its mark, and those that share a session with one.

    Process ids are not enough, as they may have been reused. Nor is the mark, as Ray's workers overwrite
    their environment with their title. Nor are the nodes' sessions, as jobs have their own.
    """
    found = dict(_sessions())
    mark = f"{MARK}={cluster.mark}".encode()
    sessions = {session for pid, session in found.items() if mark in _environment(pid)}
    return sorted(pid for pid, session in found.items() if session in sessions)


def nodes(cluster: Cluster) -> list[Node]:
    """The nodes that Ray counts as alive, by address.

    Raises:
        UserError: The cluster does not respond.
    """
    # Ray reads these once, on import. RAY_ADDRESS would take precedence over the argument below.
    os.environ.update(client_env(cluster))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        found = list_nodes(address=cluster.dashboard_url, filters=[("state", "=", "ALIVE")], timeout=10)
    except (RayStateApiException, ConnectionError, RuntimeError) as error:
        raise UserError(f"the cluster at {cluster.dashboard_url} does not respond: {error}") from error
    each = (Node(node["node_ip"], int(node["resources_total"].get("CPU", 0))) for node in found)
    return sorted(each, key=lambda node: int(node.address.rpartition(".")[2]))


def client_env(cluster: Cluster) -> dict[str, str]:
    """What a shell must export to use the cluster; contains no secrets."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_path),
        "RAY_ADDRESS": cluster.address,
        "RAY_API_SERVER_ADDRESS": cluster.dashboard_url,
    }


def _check_free(option: str, address: str, port: int) -> None:
    check(1024 <= port <= 65535, f"{option} must be from 1024 to 65535, got {port}.")
    try:
        socket.create_server((address, port)).close()
    except OSError as error:
        raise UserError(
            f"port {port} on {address} cannot be used ({error.strerror}): perhaps another cluster is up. "
            f"Stop it, or choose another port: {option} PORT"
        ) from error


def _write_token(path: Path) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _start_nodes(cluster: Cluster, num_nodes: int) -> None:
    common = [
        f"--num-cpus={cluster.cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
    ]
    head = [
        *("--head", f"--port={cluster.port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={cluster.dashboard_port}"),
        f"--ray-client-server-port={_free_port()}",  # a second cluster would find the default one taken
    ]
    started = {node_address(0): _start(cluster, node_address(0), [*head, *common])}
    _wait_for(cluster, started)
    for index in range(1, num_nodes):
        address = node_address(index)
        # Ray would count the same GPUs again on every node.
        options = [f"--address={cluster.address}", "--num-gpus=0", *common]
        started[address] = _start(cluster, address, options)
    _wait_for(cluster, started)


def _start(cluster: Cluster, address: str, options: list[str]) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"),
        f"--dashboard-agent-listen-port={_free_port()}",
        # One per node: a node that unpacks the code of a job first deletes what is there, which would
        # include the folder in which the job runs on another node.
        f"--temp-dir={cluster.ray_folder}/{address}",
        *options,
    ]
    with log_path(cluster, address).open("wb") as out:
        process = subprocess.Popen(
            command,
            env=_node_env(cluster),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # outlives this command and Ctrl-C in its terminal
        )
    cluster.pids[address] = process.pid
    cluster.save()
    return process


def _node_env(cluster: Cluster) -> dict[str, str]:
    of_others = ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    return {name: value for name, value in os.environ.items() if name not in of_others} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "lo",  # the nodes' addresses are on loopback
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # `python`
        MARK: cluster.mark,
    }


def _wait_for(cluster: Cluster, started: dict[str, subprocess.Popen[bytes]]) -> None:
    """Returns once all of these nodes have joined."""
    deadline = time.monotonic() + _START_S
    while True:
        for address, process in started.items():
            if process.poll() is not None:
                raise UserError(
                    f"node {address} exited with {process.returncode}. {_log_tail(cluster, address)}"
                )
        missing, reason = set(started), "the cluster does not respond"
        try:
            missing -= {node.address for node in nodes(cluster)}
            reason = f"{', '.join(sorted(missing))} did not join"
        except UserError:
            pass  # it has not started yet
        if not missing:
            return
        if time.monotonic() > deadline:
            raise UserError(f"after {_START_S} s {reason}. {_log_tail(cluster, min(missing))}")
        time.sleep(0.5)


def _log_tail(cluster: Cluster, address: str) -> str:
    path = log_path(cluster, address)
    return f"{path} ends with:\n{path.read_text(errors='replace')[-_LOG_TAIL_CHARS:]}"


def log_path(cluster: Cluster, address: str) -> Path:
    """Output of a node's `ray start`."""
    return Path(cluster.folder, f"{address}.log")


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def _sessions() -> Iterator[tuple[int, int]]:
    """Process id and session of every running process."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just exited
        if state not in "ZX":
            yield int(process.name), int(session)


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""  # it has just exited, or belongs to another user
