"""Training on clusters of several real nodes, that grow, lose a node, or are cut in two."""

from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from ctmsr.model import checkpoint
from pipelines.infra.checkpoints import Stored, fetched, find, newest
from tests.conftest import S3
from tests.support.child import Child
from tests.support.servers.processes import s3_server
from tests.support.servers.ray_nodes import TRAIN_WORKER, RayNodes, linked_namespaces
from tests.support.training_command import NUM_CPUS, logged, start_training

pytestmark = pytest.mark.tier

START_S, RESIZE_S = 180, 240
ELASTIC = ("train.num_workers=2", "train.min_workers=1")


@dataclass(frozen=True)
class Run:
    """A training command and where it leaves what it makes."""

    name: str
    command: Child
    storage_uri: str
    client: MlflowClient

    def wait_for_steps(self, num_steps: int, *, num_workers: int, timeout_s: float) -> Stored:
        """Returns once `num_workers` have written a checkpoint, and another one `num_steps` later."""
        first: list[int] = []

        def wanted() -> Stored | None:
            found = newest(f"{self.storage_uri}/{self.name}")
            if found is None or found.meta["num_workers"] != num_workers:
                return None
            first.append(found.step)
            return found if found.step >= first[0] + num_steps else None

        return self.command.wait_until(wanted, f"training by {num_workers}", timeout_s=timeout_s)

    def wait_to_end(self, *, timeout_s: float) -> Stored:
        """The last checkpoint of a command that must succeed."""
        self.command.wait_until(self.command.status, "end", timeout_s=timeout_s)
        assert self.command.status() == 0, self.command.log_tail()
        return find(f"{self.storage_uri}/{self.name}")


@pytest.fixture(autouse=True)
def quick_to_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long Ray Train waits for workers that cannot be placed, before it goes on with fewer."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")


def settings(name: str, bucket: str, folder: Path, *others: str) -> list[str]:
    places = [f"data.{part}_uri={bucket}/photos" for part in ("train", "val", "test")]
    storage = [f"storage_uri={bucket}/runs", f"tracking_uri=sqlite:///{folder}/mlflow.db"]
    return [f"name={name}", *places, *storage, *others]


@pytest.fixture
def bucket(s3: S3, photos: dict[str, bytes]) -> str:
    return s3.make_bucket("nodes", {f"photos/{name}": data for name, data in photos.items()})


def test_a_run_grows_and_shrinks_with_its_cluster_and_ends_as_one_that_never_changed(
    bucket: str, tmp_path: Path
) -> None:
    # Small updates: what is compared is which images a step saw, not how training magnifies last bits.
    steps = ("optim.ct_steps=300", "optim.dtm_steps=100", "optim.lr=1e-6")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    with RayNodes(tmp_path, num_cpus=NUM_CPUS + 1, env={}) as nodes:

        def start(name: str, *workers: str) -> Run:
            options = settings(name, bucket, tmp_path, *steps, *workers)
            command = start_training(options, nodes.driver_env, tmp_path / f"{name}.log")
            return Run(name, command, f"{bucket}/runs", client)

        steady = start("steady", "train.num_workers=1")
        with steady.command:
            expected = steady.wait_to_end(timeout_s=600)
        elastic = start("elastic", *ELASTIC)
        with elastic.command:
            elastic.wait_for_steps(0, num_workers=1, timeout_s=START_S)
            added = nodes.add(NUM_CPUS + 1)
            elastic.wait_for_steps(20, num_workers=2, timeout_s=RESIZE_S)
            assert [len(node.pids(TRAIN_WORKER)) for node in (nodes.head, added)] == [1, 1]
            added.kill()
            elastic.wait_for_steps(10, num_workers=1, timeout_s=RESIZE_S)
            found = elastic.wait_to_end(timeout_s=600)
    losses = losses_of(steady)
    assert losses.keys() == set(range(1, 401))
    assert losses_of(elastic) == pytest.approx(losses, rel=1e-4)
    assert found.meta["samples_seen"] == expected.meta["samples_seen"]
    for name, value in weights(expected).items():
        np.testing.assert_allclose(weights(found)[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def losses_of(run: Run) -> dict[int, float]:
    """By step; of a step that was done again, all are the same to what last bits do."""
    losses: dict[int, float] = {}
    for point in logged(run.client, run.name):
        assert point.loss == pytest.approx(losses.setdefault(point.step, point.loss), rel=1e-4)
    return losses


def weights(stored: Stored) -> dict[str, np.ndarray]:
    """The EMA."""
    with fetched(stored.uri) as folder:
        checkpoint.read_manifest(folder)
        return load_file(folder / checkpoint.MODEL_FILE)


def test_a_run_across_two_machines_outlives_a_cut_between_them(
    photos: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    with linked_namespaces() as link, s3_server(tmp_path, host="0.0.0.0", enter=link.first.enter) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{link.first_from_outside}:{store.port}")
        s3 = S3(f"http://{link.first_from_outside}:{store.port}", boto3.client("s3"), True)
        bucket = s3.make_bucket("nodes", {f"photos/{name}": data for name, data in photos.items()})
        inside = {"AWS_ENDPOINT_URL": f"http://{link.first.address}:{store.port}"}
        with RayNodes(tmp_path, num_cpus=NUM_CPUS + 1, env=inside, place=link.first) as nodes:
            second = nodes.add(NUM_CPUS + 1, place=link.second)
            options = settings("cut", bucket, tmp_path, "optim.ct_steps=150", "optim.dtm_steps=50", *ELASTIC)
            command = start_training(options, nodes.driver_env, tmp_path / "cut.log", link.first.enter)
            run = Run("cut", command, f"{bucket}/runs", client)
            with command:
                run.wait_for_steps(20, num_workers=2, timeout_s=START_S)
                assert [len(node.pids(TRAIN_WORKER)) for node in (nodes.head, second)] == [1, 1]
                link.cut()
                run.wait_for_steps(10, num_workers=1, timeout_s=RESIZE_S)
                found = run.wait_to_end(timeout_s=600)
        assert found.step == 200
        assert weights(found)
    assert losses_of(run).keys() == set(range(1, 201))
