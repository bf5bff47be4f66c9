"""The world of a fault drill: a store behind a proxy, MLflow, a small disk, a Ray cluster, and faults."""

import errno
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import skimage.data

from ctmsr.image import encode_png
from tests.conftest import PHOTOS
from tests.support.child import Child, kill
from tests.support.servers.fault_proxy import FaultProxy, fault_proxy
from tests.support.servers.processes import Server, mlflow_server, s3_server
from tests.support.servers.ray_nodes import TRAIN_WORKER, RayNodes
from tests.support.training_command import NUM_CPUS, start_training

BUCKET = "s3://drill"
STORE_FAULTS = {"slow_down": 0.25, "reset": 0.15, "stall": 0.15}
_DISK_MB = 200


@dataclass(frozen=True)
class World:
    """The running servers and nodes."""

    folder: Path
    proxy: FaultProxy
    mlflow: Server
    nodes: RayNodes
    workers: list[Child]
    """The nodes with one Ray Train worker each; the head has none."""
    disk: Path
    """The worker nodes' folder for temporary files."""

    def add_node(self) -> None:
        """Adds a worker node."""
        self.workers.append(self.nodes.add(NUM_CPUS + 1, env={"TMPDIR": str(self.disk)}))

    def train(self, name: str, total_steps: int, number: int = 0) -> Child:
        """Starts the training command; the last third of its steps are DTM."""
        dtm_steps = total_steps // 3
        settings = [
            f"name={name}",
            f"storage_uri={BUCKET}/runs",
            f"tracking_uri={self.mlflow.url}",
            *(f"data.{part}_uri={BUCKET}/photos" for part in ("train", "val", "test")),
            f"optim.ct_steps={total_steps - dtm_steps}",
            f"optim.dtm_steps={dtm_steps}",
            "train.num_workers=2",
            "train.max_failures=1000",
        ]
        return start_training(settings, self.nodes.driver_env, self.folder / f"{name}-{number}.log")


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """The world for the duration of a `with` block; this process accesses the store without the proxy."""
    with ExitStack() as stack:
        store = stack.enter_context(s3_server(folder))
        os.environ |= _aws(store.url)
        _upload_photos()
        proxy = stack.enter_context(fault_proxy(store.url, {}))
        mlflow = stack.enter_context(mlflow_server(folder))
        disk = stack.enter_context(_small_disk(folder / "disk"))
        nodes = stack.enter_context(RayNodes(folder, num_cpus=0, env=_aws(proxy.endpoint)))
        there = World(folder, proxy, mlflow, nodes, [], disk)
        there.add_node()
        there.add_node()
        yield there


def _aws(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _upload_photos() -> None:
    client, bucket = boto3.client("s3"), BUCKET.removeprefix("s3://")
    client.create_bucket(Bucket=bucket)
    for name in PHOTOS:
        photo = encode_png(getattr(skimage.data, name)()[100:196, 100:228])
        client.put_object(Bucket=bucket, Key=f"photos/{name}.png", Body=photo)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={_DISK_MB}m", "drill"]
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def kill_worker(there: World, draw: random.Random, length_s: float) -> None:
    """Kills a training process, as the kernel does when memory runs out."""
    node = draw.choice(there.workers)
    alive = node.wait_until(lambda: node.pids(TRAIN_WORKER) or None, "worker", timeout_s=120)
    kill(draw.choice(alive))


def kill_node(there: World, draw: random.Random, length_s: float) -> None:
    """Cuts a machine's power, and adds a new machine after `length_s`."""
    there.workers.pop(draw.randrange(len(there.workers))).kill()
    time.sleep(length_s)
    there.add_node()


def fail_store(there: World, draw: random.Random, length_s: float) -> None:
    """Makes the store busy, drop connections and stall for `length_s`."""
    there.proxy.change(STORE_FAULTS)
    time.sleep(length_s)
    there.proxy.change({})


def kill_mlflow(there: World, draw: random.Random, length_s: float) -> None:
    """Takes MLflow down for `length_s`."""
    there.mlflow.kill()
    time.sleep(length_s)
    there.mlflow.start()


def fill_disk(there: World, draw: random.Random, length_s: float) -> None:
    """Keeps the worker nodes' disk full for `length_s`, whatever is deleted there in the meantime."""
    ballast, until = there.disk / "ballast", time.monotonic() + length_s
    try:
        with ballast.open("wb", buffering=0) as file:
            while time.monotonic() < until:
                try:
                    file.write(bytes(2**20))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    time.sleep(0.02)
    finally:
        ballast.unlink()


FAULTS: Mapping[str, Callable[[World, random.Random, float], None]] = {
    "worker": kill_worker,
    "node": kill_node,
    "store": fail_store,
    "mlflow": kill_mlflow,
    "disk": fill_disk,
}
"""Faults by name. Each returns once the fault itself is over, before the training has recovered."""
