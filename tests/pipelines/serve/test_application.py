"""The application as `serve run` and `serve deploy` build it, and how it grows."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
import yaml
from ray import serve

from ctmsr.errors import UserError
from ctmsr.image import encode_png
from pipelines.serve.application import Arguments, find
from pipelines.serve.run import serving
from tests.support.repository import ROOT
from tests.support.servers.ray_nodes import free_port
from tests.support.serving import PICTURE

TOKEN = "0123456789abcdef"


def test_asking_for_the_application_is_what_imports_ray() -> None:
    code = (
        "import sys, pipelines.serve; assert not {'ray', 'torch'} & set(sys.modules);"
        "from pipelines.serve import app; assert 'ray' in sys.modules; print(app.__module__)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert printed.stdout == "pipelines.serve.application\n"


@contextmanager
def serve_run(config: dict, folder: Path) -> Iterator[Path]:
    """Ray's own command with a config file, on a cluster of its own; yields the file with its output."""
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "serve.yaml")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": str(ROOT), "CTMSR_SERVE_TOKEN": TOKEN, "RAY_ADDRESS": "local"}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=output, stderr=output)
        try:
            yield log
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.mark.slow
def test_serve_run_serves_it_with_typed_arguments(registry: str, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    application = {
        "name": "upscale",
        "import_path": "pipelines.serve:app",
        "args": {"model": "models:/toy@champion", "tracking_uri": registry, "needs_token": True},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    with serve_run(config, tmp_path) as log:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            try:
                if requests.get(url, timeout=5).status_code == 200:
                    break
            except requests.RequestException:
                time.sleep(1)
        assert requests.post(f"{url}/upscale", data=encode_png(PICTURE), timeout=60).status_code == 401
        shown = {"Authorization": f"Bearer {TOKEN}"}
        answer = requests.post(f"{url}/upscale", data=encode_png(PICTURE), headers=shown, timeout=60)
        assert (answer.status_code, answer.headers["X-Model-Version"]) == (200, "models:/toy/1")
    assert TOKEN not in log.read_text()


@pytest.mark.slow
def test_a_token_that_the_nodes_lack_is_told(
    registry: str, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTMSR_SERVE_TOKEN", raising=False)
    served = Arguments(model="models:/toy/1", tracking_uri=registry, needs_token=True)
    with pytest.raises(UserError, match=r"cannot start models:/toy/1: .*CTMSR_SERVE_TOKEN must hold"):
        serving(served, find(served), host="127.0.0.1", port=free_port()).__enter__()


@pytest.mark.slow
def test_a_second_replica_starts_when_pictures_wait(registry: str, ray_session: None) -> None:
    served = Arguments(model="models:/toy/1", tracking_uri=registry, max_replicas=2, timeout=20)
    picture = encode_png(np.zeros((700, 700, 3), np.uint8))

    def send(url: str) -> set[int]:
        statuses = set()
        while replicas() < 2 and time.monotonic() < until:
            statuses.add(requests.post(f"{url}/upscale", data=picture, timeout=200).status_code)
        return statuses

    def replicas() -> int:
        status = serve.status().applications["upscale"].deployments["upscaler"]
        return sum(number for state, number in status.replica_states.items() if state == "RUNNING")

    until = time.monotonic() + 240
    with serving(served, find(served), host="127.0.0.1", port=free_port()) as url:
        with ThreadPoolExecutor(8) as pool:
            statuses = set().union(*pool.map(send, [url] * 8))
        assert replicas() == 2
    assert statuses <= {200, 503, 504}
