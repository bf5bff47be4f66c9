"""The store of the benchmarks: Ceph's gateway (tests/support/servers/ceph.py) with a bucket of JPEG crops.

If AWS_ENDPOINT_URL is set, the store there is used instead, which must not have these buckets yet.
"""

import io
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import boto3
import numpy as np
import skimage.data
from PIL import Image

from tests.support.servers.ceph import ACCESS_KEY, SECRET_KEY, ceph_gateway

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina")


@contextmanager
def bucket(num: int, side: int) -> Iterator[str]:
    """URI of a bucket of `num` square pictures; this process's AWS variables keep pointing to it."""
    with _store():
        client = boto3.client("s3")
        client.create_bucket(Bucket="photos")

        def put(number: int) -> None:
            client.put_object(Bucket="photos", Key=f"{number:06d}.jpg", Body=photo(number, side))

        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(put, range(num)):
                pass
        yield "s3://photos"


@contextmanager
def _store() -> Iterator[None]:
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ceph") as folder, ceph_gateway(Path(folder)) as endpoint:
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }
        yield


def photo(number: int, side: int) -> bytes:
    """A JPEG file with a different crop for every number."""
    image = _whole(PHOTOS[number % len(PHOTOS)])
    draw = np.random.default_rng(number)
    top, left = (int(draw.integers(max(1, length - side + 1))) for length in image.shape[:2])
    file = io.BytesIO()
    Image.fromarray(image[top : top + side, left : left + side]).save(file, "JPEG", quality=92)
    return file.getvalue()


@cache
def _whole(name: str) -> np.ndarray:
    return getattr(skimage.data, name)()
