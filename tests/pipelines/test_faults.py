"""A store that fails now and then loses nothing, and one that fails for good is named with the object."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ctmsr.errors import DataError
from pipelines.storage import list_images, open_uri, read_bytes, write_bytes
from tests.conftest import S3
from tests.fault_proxy import FaultProxy, fault_proxy

FILES = {f"{i:02d}.png": bytes([i]) * (20_000 + i) for i in range(30)}


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
    with failing(s3, **{kind: 0.2}) as proxy:
        file_system, root = open_uri(bucket)
        assert {key: read_bytes(file_system, f"{root}/{key}") for key in FILES} == FILES
        assert [ref.key for ref in list_images(bucket)] == sorted(FILES)
        write_bytes(f"{bucket}/out/x.bin", FILES["00.png"])
        assert read_bytes(file_system, f"{root}/out/x.bin") == FILES["00.png"]
    assert proxy.counts[kind] >= 3


def test_a_stalled_answer_is_waited_for(s3: S3, bucket: str) -> None:
    with failing(s3, stall=0.3) as proxy:
        file_system, root = open_uri(bucket)
        assert {key: read_bytes(file_system, f"{root}/{key}") for key in list(FILES)[:12]}
    assert proxy.counts["stall"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow_down", "reset", "cut"])
def test_a_fault_that_stays_ends_with_the_name_of_the_object(s3: S3, bucket: str, kind: str) -> None:
    with failing(s3, **{kind: 1.0}):
        file_system, root = open_uri(bucket)
        started = time.monotonic()
        with pytest.raises(DataError, match=r"cannot use faults/03\.png: "):
            read_bytes(file_system, f"{root}/03.png")
    assert time.monotonic() - started < 60
