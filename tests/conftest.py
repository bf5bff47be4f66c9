"""Fixtures for all tests: real photographs, an S3 server and a Ray cluster on this machine, started once."""

import logging
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.repository import ROOT

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina")


@dataclass(frozen=True)
class S3:
    """A real S3 server on a loopback port; the AWS variables of this process point to it."""

    endpoint: str
    client: Any
    is_moto: bool

    def make_bucket(self, name: str, files: Mapping[str, bytes] | None = None) -> str:
        """Creates a bucket with `files`, by key, and returns its URI."""
        self.client.create_bucket(Bucket=name)
        for key, data in (files or {}).items():
            self.client.put_object(Bucket=name, Key=key, Body=data)
        return f"s3://{name}"

    @contextmanager
    def as_a_stranger(self) -> Iterator[None]:
        """While active, this process signs requests with a secret that the server does not know."""
        if self.is_moto:  # which accepts any signature unless told otherwise
            self._check_after("0")
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
                yield
        finally:
            if self.is_moto:
                self._check_after("inf")

    def _check_after(self, num_requests: str) -> None:
        url, headers = f"{self.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        request = urllib.request.Request(url, num_requests.encode(), headers, method="POST")
        urllib.request.urlopen(request, timeout=10).close()


Store = Callable[[Mapping[str, bytes]], str]
"""Creates a new folder with files, by key, and returns its URI."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", choices=["moto", "ceph"], default="moto", help="the S3 server that tests use")
    parser.addoption(
        "--priority",
        choices=["usual", "low"],
        help="only tests that use the cluster or measure time, or only the others",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that --store and --priority do not ask for: with Ceph, those that use no store."""
    priority, is_moto = config.getoption("--priority"), config.getoption("--store") == "moto"

    def is_left_out(item: pytest.Item) -> bool:
        fixtures = getattr(item, "fixturenames", ())
        needs_attention = "ray_session" in fixtures or item.get_closest_marker("timed") is not None
        is_other = priority is not None and needs_attention != (priority == "usual")
        return is_other or not (is_moto or "s3" in fixtures)

    left_out = [item for item in items if is_left_out(item)]
    items[:] = [item for item in items if not is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny networks gain nothing from threads, which wait for each other on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest) -> Iterator[S3]:
    import boto3

    is_moto = request.config.getoption("--store") == "moto"
    with _moto() if is_moto else _ceph() as server, pytest.MonkeyPatch.context() as patch:
        endpoint, access_key, secret_key = server
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        yield S3(endpoint, boto3.client("s3"), is_moto)


@contextmanager
def _moto() -> Iterator[tuple[str, str, str]]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}", "test", "test"
    server.stop()


@contextmanager
def _ceph() -> Iterator[tuple[str, str, str]]:
    from tests.support.servers.ceph import ACCESS_KEY, SECRET_KEY, ceph_gateway

    with tempfile.TemporaryDirectory(prefix="ceph") as folder, ceph_gateway(Path(folder)) as endpoint:
        yield endpoint, ACCESS_KEY, SECRET_KEY


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: S3) -> Store:
    """Fills a new folder in either kind of storage with files, by key."""

    from pipelines.infra.storage import write_bytes

    def fill(files: Mapping[str, bytes]) -> str:
        if request.param == "s3":
            return s3.make_bucket(f"b{time.time_ns()}", files)
        for key, data in files.items():
            write_bytes(str(tmp_path / "data" / key), data)
        return str(tmp_path / "data")

    return fill


@pytest.fixture(scope="session")
def ray_session(s3: S3) -> Iterator[None]:
    """A local cluster of four logical CPUs whose workers can reach the S3 server."""
    import ray

    from pipelines.serve.guard import PROXY_ENV

    with pytest.MonkeyPatch.context() as patch:
        for name, value in PROXY_ENV.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 is Ray's own: near that of the tests that run beside it
        patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=500_000_000,
            include_dashboard=True,  # Tune over Train does not finish without it
            log_to_driver=False,
            logging_level=logging.WARNING,
            logging_config=ray.LoggingConfig(log_level="WARNING"),
        )
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def photos() -> dict[str, bytes]:
    """PNG files of 128 x 96 pixels, by name: the centres of real photographs."""
    import skimage.data

    from ctmsr.image import encode_png

    files = {}
    for name in PHOTOS:
        image = getattr(skimage.data, name)()
        top, left = (image.shape[0] - 96) // 2, (image.shape[1] - 128) // 2
        files[f"{name}.png"] = encode_png(image[top : top + 96, left : left + 128])
    return files
