"""A model served by Ray: through its proxy, with the guard in it, and started by the command."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import ray
import requests

from ctmsr.errors import UserError
from ctmsr.image import decode, encode_png
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.serve.application import Arguments, find
from pipelines.serve.run import _own_port, serving
from tests.support.servers.ray_nodes import free_port
from tests.support.serving import PICTURE

TOKEN = "0123456789abcdef"


def arguments(registry: str, **more: object) -> Arguments:
    return Arguments(model="models:/toy/1", tracking_uri=registry, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def url(registry: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a token, on a free port."""
    secret = tmp_path_factory.mktemp("secret") / "token"
    secret.write_text(TOKEN)
    served = arguments(registry, token_file=str(secret))
    with serving(served, find(served), host="127.0.0.1", port=free_port()) as url:
        yield url


def posted(url: str, body: bytes, **headers: str) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKEN}", **headers}
    return requests.post(f"{url}/upscale", data=body, headers=headers, timeout=60)


def test_ray_serves_the_page_and_pictures(url: str, model: ConsistencyModel) -> None:
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert b"Upscale a picture" in answer.read()
    answer = posted(url, encode_png(PICTURE), **{"X-Request-Id": "mine-1"})
    assert np.array_equal(decode(answer.content, name=""), upscale(model, PICTURE, sigma_max=0.9))
    assert answer.headers["X-Model-Version"] == "models:/toy/1"
    assert answer.headers["X-Request-Id"] == "mine-1"


def test_a_refusal_reaches_the_client_even_while_it_is_still_sending(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="413") as raised:
        urllib.request.urlopen(f"{url}/upscale", data=bytes(40 * 2**20), timeout=60)
    assert raised.value.read().decode() == "The file is too large: at most 32 MB are accepted.\n"


def test_without_the_token_nothing_is_upscaled(url: str) -> None:
    answer = posted(url, encode_png(PICTURE), Authorization="Bearer another-one-of-16")
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="ctmsr"')


def test_the_guard_runs_in_the_proxy(url: str) -> None:
    """Ray itself would take this header as the end of its time limit, and would answer 408."""
    answer = posted(url, encode_png(PICTURE), **{"X-Request-Timeout-Seconds": "0.0001"})
    assert answer.status_code == 200


def test_requests_are_counted_for_prometheus(url: str) -> None:
    posted(url, encode_png(PICTURE))
    port = ray.nodes()[0]["MetricsExportPort"]
    names = ("requests_total", "seconds_bucket", "pixels_total", "queue")
    wanted = [f"ray_ctmsr_serve_{name}{{" for name in names]
    until = time.monotonic() + 30
    while True:
        exported = requests.get(f"http://127.0.0.1:{port}", timeout=10).text
        if all(name in exported for name in wanted) or time.monotonic() > until:
            break
        time.sleep(0.5)
    assert [name for name in wanted if name not in exported] == []
    assert 'status="200"' in exported


def test_a_second_server_on_a_cluster_is_told_at_once(url: str, registry: str) -> None:
    served = arguments(registry)
    with pytest.raises(UserError, match=r"Ray Serve already runs .* `serve deploy`"):
        serving(served, find(served), host="127.0.0.1", port=free_port()).__enter__()


def test_the_port_of_a_running_server_is_taken(url: str, registry: str) -> None:
    served, port = arguments(registry), int(url.rpartition(":")[2])
    with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1, port {port} .*--port"):
        serving(served, find(served), host="127.0.0.1", port=port).__enter__()


def test_of_two_servers_that_start_together_one_is_told(registry: str) -> None:
    served, port = arguments(registry), free_port()
    with _own_port("127.0.0.1", port), pytest.raises(UserError, match=r"cannot listen on .*lock"):
        serving(served, find(served), host="127.0.0.1", port=port).__enter__()


def test_a_port_that_is_taken_is_told_at_once(registry: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, served = taken.getsockname()[1], arguments(registry)
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1, port {port} .*--port"):
            serving(served, find(served), host="127.0.0.1", port=port).__enter__()


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(registry: str) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pipelines.serve", "--port", str(port)]
    command += ["--model", "models:/toy@champion", "--tracking-uri", registry]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[1] == f"models:/toy/1 is at http://127.0.0.1:{port} (Ctrl-C stops it)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as answer:
            assert answer.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
