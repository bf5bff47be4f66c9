"""A local cluster's folder and processes, without Ray: who is ended, who is not, and what is refused."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import main
from cluster.local_nodes import MARK, Cluster, down, load, processes, up
from ctmsr.errors import UserError
from tests.support.repository import ROOT

OPTIONS = {"num_nodes": 2, "cpus": 1}


@pytest.fixture
def others() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to end after the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """The record of one that has started nothing yet."""
    ray_folder = tmp_path / "ray"
    ray_folder.mkdir()
    (tmp_path / "token").write_text("of before")
    made = Cluster(str(tmp_path), "the-mark", 6479, 8365, 1, str(ray_folder))
    made.save()
    return made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(*command: str, mark: str | None) -> subprocess.Popen[bytes]:
    env = dict(os.environ) | ({MARK: mark} if mark else {})
    return subprocess.Popen(command, env=env, start_new_session=True)


def wait_for(count: int, cluster: Cluster) -> list[int]:
    deadline = time.monotonic() + 10
    while len(found := processes(cluster)) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def test_down_ends_what_carries_the_mark_and_its_sessions_and_nothing_else(
    cluster: Cluster, others: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    # As a node does: a worker whose environment cannot be read any more, and a job in a session of its own.
    script = "env -i sleep 60 & setsid sleep 60 & wait"
    node = start("sh", "-c", script, mark=cluster.mark)
    stranger = start("sleep", "60", mark=None)
    another = start("sleep", "60", mark="another-mark")
    others += [node, stranger, another]
    wait_for(3, cluster)  # with the shell
    # The recorded number of a node that has ended is now a stranger's.
    cluster.pids.update({"127.0.0.2": node.pid, "127.0.0.3": stranger.pid})
    cluster.save()
    assert down(tmp_path) == 2
    assert processes(cluster) == []
    assert node.wait(timeout=5) == -9
    assert (stranger.poll(), another.poll()) == (None, None)
    assert {path.name for path in tmp_path.iterdir()} == set()
    assert down(tmp_path) == 0


def test_a_cluster_that_is_up_is_refused_and_left_alone(
    cluster: Cluster, others: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    others.append(start("sleep", "60", mark=cluster.mark))
    wait_for(1, cluster)
    with pytest.raises(UserError, match=r"is up in .*stop it first: python -m cluster\.local down --folder"):
        up(tmp_path, port=free_port(), dashboard_port=free_port(), **OPTIONS)
    assert others[0].poll() is None
    assert load(tmp_path) == cluster
    assert (tmp_path / "token").read_text() == "of before"


@pytest.mark.parametrize(("option", "address"), [("--port", "127.0.0.2"), ("--dashboard-port", "127.0.0.1")])
def test_a_port_that_is_taken_is_refused_before_anything_is_written(
    tmp_path: Path, option: str, address: str
) -> None:
    with socket.create_server((address, 0)) as server:
        taken = server.getsockname()[1]
        ports = {"port": free_port(), "dashboard_port": free_port()}
        ports |= {option.removeprefix("--").replace("-", "_"): taken}
        with pytest.raises(UserError, match=rf"port {taken} on {address} cannot be used \(.*{option} PORT"):
            up(tmp_path / "new", **OPTIONS, **ports)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "0"], "--nodes must be from 1 to 50, got 0"),
        (["--cpus", "0"], "--cpus must be at least 1, got 0"),
        (["--port", "80"], "--port must be from 1024 to 65535, got 80"),
    ],
)
def test_numbers_that_are_not_allowed(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["up", "--folder", str(tmp_path / "new"), *options])
    assert not (tmp_path / "new").exists()


def test_without_ray_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    script = "import sys; sys.modules['ray'] = None; from cluster.local import main, run; run(main)"
    command = [sys.executable, "-c", script, "up", "--folder", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: Ray is not installed for {sys.executable}. Run `make setup`")
    assert len(done.stderr.splitlines()) == 1


def test_status_and_down_where_nothing_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--folder", str(tmp_path)]) == 1
    assert main(["down", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"no cluster is up in {tmp_path}. Start one: python -m cluster.local up"
    assert printed[1] == f"no cluster is up in {tmp_path}."


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"port": 1})])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "cluster.json").write_text(text)
    with pytest.raises(UserError, match=r"cluster\.json is damaged"):
        down(tmp_path)
