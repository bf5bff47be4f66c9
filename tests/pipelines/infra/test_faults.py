"""A store that fails now and then loses nothing, and one that fails for good is named with the object."""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ctmsr.errors import DataError
from pipelines.infra.hedging import Hedge
from pipelines.infra.listing import list_images
from pipelines.infra.storage import open_uri, read_bytes, read_range, write_bytes
from tests.conftest import S3
from tests.support.malformed import good
from tests.support.repository import ROOT
from tests.support.servers.fault_proxy import STALL_S, FaultProxy, fault_proxy

FILES = {f"{i:02d}.png": bytes([i]) * (20_000 + i) for i in range(30)}

EPOCH = """
import json, sys, ray
from ctmsr.degradation.config import DegradationConfig
from pipelines.data.pictures import find_pictures
from pipelines.data.stream import train_stream
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
pictures = find_pictures(sys.argv[1])
stream = train_stream(pictures, hr_crop_size=32, scale=4, degradation=DegradationConfig(), seed=0, skip=0,
                      total=len(pictures), global_batch_size=8, num_workers=1)
batches = stream.iter_batches(batch_size=8, batch_format="numpy")
print(json.dumps([row for rows in batches for row in zip(rows["key"], rows["problem"])]))
"""
"""A process of its own: the endpoint is that of the environment in which Ray starts."""


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    return s3.make_bucket("faults", FILES)


@contextmanager
def failing(s3: S3, **shares: float) -> Iterator[FaultProxy]:
    """The store behind a proxy, for what this process opens meanwhile."""
    with fault_proxy(s3.endpoint, shares) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("kind", ["slow_down", "reset", "cut"])
def test_a_fault_now_and_then_is_not_seen(s3: S3, bucket: str, kind: str) -> None:
    with failing(s3, **{kind: 0.3}) as proxy:
        file_system, root = open_uri(bucket)
        assert {key: read_bytes(file_system, f"{root}/{key}") for key in FILES} == FILES
        assert [file.key for file in list_images(bucket).files] == sorted(FILES)
        write_bytes(f"{bucket}/out/x.bin", FILES["00.png"])
        assert read_bytes(file_system, f"{root}/out/x.bin") == FILES["00.png"]
    assert proxy.counts[kind] >= 3


def test_a_picture_is_read_by_one_request(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.infra.hedging._LEAST_KNOWN", math.inf)  # no second one on a slow machine
    with failing(s3) as proxy:
        file_system, root = open_uri(bucket)
        assert {key: read_bytes(file_system, f"{root}/{key}") for key in FILES} == FILES
        assert proxy.counts == {"ok": len(FILES)}
        for start, length in ((0, 1), (100, 50), (20_002, 3)):
            found = read_range(file_system, f"{root}/05.png", start, length)
            assert found == FILES["05.png"][start : start + length]
        assert proxy.counts == {"ok": len(FILES) + 3}


def test_a_stalled_answer_is_waited_for(s3: S3, bucket: str) -> None:
    with failing(s3, stall=0.3) as proxy:
        file_system, root = open_uri(bucket)
        assert {key: read_bytes(file_system, f"{root}/{key}") for key in list(FILES)[:12]}
    assert proxy.counts["stall"] >= 1


@pytest.mark.timed
def test_a_stalled_answer_is_not_waited_for_once_usual_times_are_known(
    s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hedge = Hedge()
    monkeypatch.setattr("pipelines.infra.s3._hedge", hedge)
    with failing(s3) as proxy:
        file_system, root = open_uri(bucket)
        for _ in range(100):
            hedge(lambda: None)
        proxy.next = ["stall"]
        started = time.monotonic()
        assert read_bytes(file_system, f"{root}/07.png") == FILES["07.png"]
        assert time.monotonic() - started < 0.75 * STALL_S
        assert proxy.counts == {"stall": 1, "ok": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow_down", "reset", "cut"])
def test_a_fault_that_stays_ends_with_the_name_of_the_object(s3: S3, bucket: str, kind: str) -> None:
    with failing(s3, **{kind: 1.0}):
        file_system, root = open_uri(bucket)
        started = time.monotonic()
        with pytest.raises(DataError, match=r"cannot use faults/03\.png: "):
            read_bytes(file_system, f"{root}/03.png")
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_an_epoch_has_every_key_once_for_all_the_faults(s3: S3) -> None:
    corpus = {key: data for key, (data, _) in good(200, seed=11).items()}
    uri = s3.make_bucket("faulty-epoch", corpus)
    shares = {"slow_down": 0.1, "reset": 0.05, "stall": 0.02, "cut": 0.05}
    with fault_proxy(s3.endpoint, shares) as proxy:
        root = str(ROOT)
        environment = os.environ | {"AWS_ENDPOINT_URL": proxy.endpoint, "PYTHONPATH": root}
        command = [sys.executable, "-c", EPOCH, uri]
        ended = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False
        )
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = json.loads(ended.stdout.splitlines()[-1])
    assert Counter(key for key, _ in rows) == Counter(dict.fromkeys(corpus, 1))
    assert {problem for _, problem in rows} == {""}
    assert min(proxy.counts[kind] for kind in shares) >= 1
