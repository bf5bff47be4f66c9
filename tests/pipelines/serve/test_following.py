"""The champion changes while a server runs: another version takes over, and no request fails."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
import torch

from ctmsr.errors import TrackingError
from ctmsr.image import decode, encode_png
from ctmsr.model import checkpoint
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.register.run import register
from pipelines.serve.application import Arguments, find
from pipelines.serve.run import serving
from pipelines.serve.upscaler import Upscaler
from pipelines.tracking.models import find_version
from pipelines.tracking.runs import connect
from tests.support import serving as local
from tests.support.registering import SIGMA_MAX, TINY, register_model, write_checkpoint
from tests.support.servers.ray_nodes import free_port
from tests.support.serving import PICTURE

CHAMPION = "models:/toy@champion"
PNG = encode_png(PICTURE)
POLL_S = 0.2


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three versions; the first is the champion."""
    folder = tmp_path_factory.mktemp("following")
    uri = register_model(network(1), folder)
    for seed in (2, 3):
        path = write_checkpoint(folder / f"{seed}", seed)
        register(path, tracking_uri=uri, model_name="toy", run_id=None, metrics={}, tags={})
    promote(uri, 1)
    return uri


def network(version: int) -> ConsistencyModel:
    """The network of a version."""
    torch.manual_seed(version)
    return ConsistencyModel(TINY).eval()


def promote(registry: str, version: int) -> None:
    connect(registry).set_registered_model_alias("toy", "champion", str(version))


def expected() -> dict[str, np.ndarray]:
    """What each version makes of the picture, by its name."""
    return {
        f"models:/toy/{number}": upscale(network(number), PICTURE, sigma_max=SIGMA_MAX)
        for number in (1, 2, 3)
    }


def wait_for(upscaler: Upscaler, uri: str) -> None:
    until = time.monotonic() + 30
    while upscaler._loaded.released.uri != uri:
        assert time.monotonic() < until, f"{uri} has not taken over"
        time.sleep(0.02)


# In this process


class Lines(logging.Handler):
    """What Ray Serve's log says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def wait(self) -> str:
        """The first line, once there is one."""
        until = time.monotonic() + 30
        while not self.said:
            assert time.monotonic() < until, "nothing was logged"
            time.sleep(0.02)
        return self.said[0]


@pytest.fixture
def log() -> Iterator[Lines]:
    lines, logger = Lines(), logging.getLogger("ray.serve")
    logger.addHandler(lines)
    yield lines
    logger.removeHandler(lines)


@pytest.fixture
def upscaler(registry: str) -> Iterator[Upscaler]:
    """A replica that follows the champion, at first version 1."""
    promote(registry, 1)
    upscaler = local.upscaler(registry, CHAMPION, poll_s=0.01)
    yield upscaler
    upscaler.stop()


def test_a_version_that_does_not_load_is_reported_once_and_not_served(
    registry: str, upscaler: Upscaler, log: Lines
) -> None:
    server = local.front(upscaler)
    source = Path(find_version(registry, "models:/toy/2").source.removeprefix("file://"))
    weights = source / "artifacts/checkpoint" / checkpoint.MODEL_FILE
    hidden = weights.rename(weights.with_suffix(".hidden"))
    promote(registry, 2)
    assert log.wait().startswith("models:/toy/1 goes on serving: models:/toy/2 was fetched from")
    time.sleep(0.5)
    assert local.ask(server, PNG).headers["x-model-version"] == "models:/toy/1"
    assert len(log.said) == 1
    hidden.rename(weights)
    promote(registry, 3)
    wait_for(upscaler, "models:/toy/3")
    answer = local.ask(server, PNG)
    assert np.array_equal(decode(bytes(answer.body), name=""), expected()["models:/toy/3"])


def test_without_a_champion_the_server_goes_on_but_none_starts(
    registry: str, upscaler: Upscaler, log: Lines
) -> None:
    connect(registry).delete_registered_model_alias("toy", "champion")
    assert "models:/toy@champion is not in the registry" in log.wait()
    assert "aliases of toy: " in log.wait()
    assert local.ask(local.front(upscaler), PNG).status_code == 200
    with pytest.raises(TrackingError, match=r"toy@champion is not in the registry"):
        find(Arguments(model=CHAMPION, tracking_uri=registry))


# Through Ray


@contextmanager
def load(url: str, num_requests: int) -> Iterator[list[requests.Response]]:
    """Sends requests, eight at a time, during a `with` block; it ends when all are answered."""
    sessions = threading.local()
    answers: list[requests.Response] = []

    def send(number: int) -> None:
        if not hasattr(sessions, "one"):
            sessions.one = requests.Session()
        answers.append(sessions.one.post(f"{url}/upscale", data=PNG, timeout=120))

    with ThreadPoolExecutor(8) as pool:
        sending = [pool.submit(send, number) for number in range(num_requests)]
        yield answers
        for one in sending:
            one.result()


def check_no_request_fails(registry: str, num_requests: int) -> None:
    promote(registry, 1)
    made = expected()
    served = Arguments(model=CHAMPION, tracking_uri=registry, poll_s=POLL_S)
    with serving(served, find(served), host="127.0.0.1", port=free_port()) as url:
        with load(url, num_requests) as answers:
            for version, part in ((2, 0.2), (3, 0.6)):
                while len(answers) < part * num_requests:
                    time.sleep(0.01)
                promote(registry, version)
        last = requests.post(f"{url}/upscale", data=PNG, timeout=60)
    assert Counter(answer.status_code for answer in answers) == {200: num_requests}
    for answer in answers:
        name = answer.headers["X-Model-Version"]
        assert np.array_equal(decode(answer.content, name=""), made[name]), name
    counts = Counter(answer.headers["X-Model-Version"] for answer in answers)
    print(f"{num_requests} requests: {dict(sorted(counts.items()))}")
    assert {"models:/toy/1"} < set(counts) <= set(made)
    assert last.headers["X-Model-Version"] != "models:/toy/1"


def test_no_request_fails_while_the_champion_changes_twice(registry: str, ray_session: None) -> None:
    check_no_request_fails(registry, 60)


@pytest.mark.slow
def test_no_request_of_a_thousand_fails(registry: str, ray_session: None) -> None:
    check_no_request_fails(registry, 1000)
