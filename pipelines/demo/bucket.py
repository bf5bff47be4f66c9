"""The demo's bucket: photographs that ship with scikit-image and scikit-learn, on an S3 server in memory."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "ctmsr-demo"
PHOTOS = {  # motorcycle_left and _right show one scene, so they stay together
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coffee.png",
        "grass.png",
        "gravel.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
    ),
    "val": ("rocket.jpg",),
    "test": ("chelsea.png", "china.jpg", "flower.jpg"),
}


@contextmanager
def s3_server() -> Iterator[None]:
    """An S3 server on loopback, in memory; the standard AWS variables point to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield
    finally:
        server.stop()


def upload_photos() -> None:
    """Makes the bucket and puts the photographs in it, by part."""
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for part, names in PHOTOS.items():
        for name in names:
            client.put_object(Bucket=BUCKET, Key=f"photos/{part}/{name}", Body=photo(name))
    held_out = len(PHOTOS["val"]) + len(PHOTOS["test"])
    print(
        f"uploaded {len(PHOTOS['train'])} photographs to train on and {held_out} held out to s3://{BUCKET}/photos"
    )


def photo(name: str) -> bytes:
    """The file of one of PHOTOS."""
    for package, folder in (("skimage.data", "."), ("sklearn.datasets", "images")):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent / folder / name
        if path.is_file():
            return path.read_bytes()
    raise FileNotFoundError(name)
