"""From pictures to upscaled pictures by jobs on a local cluster, and what becomes of secrets there."""

import base64
import hashlib
import json
import secrets
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ctmsr.image import decode, encode_png
from pipelines.infra.checkpoints import find
from pipelines.infra.storage import list_sizes
from tests.conftest import S3
from tests.support.child import Child
from tests.support.repository import ROOT
from tests.support.servers.local_cluster import LocalCluster, local, local_cluster, shell_env
from tests.support.servers.processes import Server, mlflow_server
from tests.support.servers.ray_nodes import free_port
from tests.support.training_command import NUM_CPUS, SETTINGS

pytestmark = pytest.mark.tier

NUM_SMALL = 18
"""More than `pipelines.upscale` makes without Ray."""
SEEN = """
import hashlib, json, os, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
def seen():
    return {name: hashlib.sha256(os.environ.get(name, "").encode()).hexdigest() for name in NAMES}
ray.init(logging_level="WARNING")
there = ray.remote(seen)
found = {"driver": seen()}
for node in ray.nodes():
    task = there.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote()
    found[node["NodeManagerAddress"]] = ray.get(task)
print("SEEN" + json.dumps(found))
"""
"""Tells what a job, and a task on each node, find in their environment."""
COMMIT = secrets.token_hex(20)


@dataclass(frozen=True)
class World:
    """A run with everything that it needs and leaves."""

    cluster: LocalCluster
    mlflow: Server
    s3: S3
    bucket: str
    folder: Path
    name: str
    """Of the run. Not secret, and distinctive: a search that does not find it anywhere finds nothing."""
    planted: Mapping[str, str]
    """Secrets by the name of their variable."""

    def places(self) -> list[str]:
        """Options of the commands that take a config."""
        settings = [
            *SETTINGS,
            f"name={self.name}",
            f"storage_uri={self.bucket}/runs",
            f"data.train_uri={self.bucket}/photos.index",
            f"data.val_uri={self.bucket}/photos/rocket.png",
            "tune.num_trials=1",
            "tune.max_concurrent=1",
            "tune.ct_steps=2",
            "optim.ct_steps=3",
            "optim.dtm_steps=1",
        ]
        options = [part for setting in settings for part in ("--set", setting)]
        return [*options, "--tracking-uri", self.mlflow.url]

    def needles(self) -> dict[str, bytes]:
        """What must not be found: secrets, as they are and as HTTP carries a password."""
        basic = f"{self.planted['MLFLOW_TRACKING_USERNAME']}:{self.planted['MLFLOW_TRACKING_PASSWORD']}"
        found = {name: text.encode() for name, text in self.planted.items() if "USERNAME" not in name}
        found["basic authentication"] = base64.b64encode(basic.encode())
        found["token"] = (self.cluster.folder / "token").read_bytes()
        return found


@pytest.fixture(scope="module")
def world(s3: S3, photos: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("jobs")
    planted = {
        name: f"planted-{secrets.token_hex(12)}"
        for name in (
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
            "RAY_AUTH_TOKEN",  # of another cluster, which this shell used before
        )
    }
    files = {f"photos/{name}": data for name, data in photos.items()}
    picture = decode(photos["coffee.png"], name="coffee.png")
    for number in range(NUM_SMALL):
        files[f"small/{number:02d}.png"] = encode_png(picture[number : number + 12, :16].copy())
    bucket = s3.make_bucket(f"jobs-{time.time_ns()}", files)
    # An MLflow server without a login takes the password of whoever sends one.
    with mlflow_server(folder) as mlflow:
        shell = shell_env(**planted)
        with local_cluster(folder / "cluster", num_nodes=2, cpus=NUM_CPUS + 1, env=shell) as cluster:
            name = f"run-{secrets.token_hex(6)}"
            yield World(cluster, mlflow, s3, bucket, folder, name, planted)


def test_up_prints_what_to_export_but_no_secret(world: World) -> None:
    exported = {name for name in world.cluster.env if name.startswith("RAY_A")}
    assert exported >= {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
    assert "RAY_AUTH_TOKEN" not in world.cluster.env  # a token of before is unset
    token = Path(world.cluster.env["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert not [name for name, text in world.needles().items() if text.decode() in world.cluster.printed]
    done = local("status", world.cluster.folder, env=shell_env())
    assert done.stdout.splitlines()[2].startswith(f"2 of 2 nodes alive, {2 * (NUM_CPUS + 1)} CPUs")
    again = local("up", world.cluster.folder, env=shell_env())
    assert again.returncode == 2
    assert "error: a cluster of 2 nodes is up in" in again.stderr


def test_secrets_reach_jobs_and_workers_on_every_node(world: World) -> None:
    names = [name for name in world.planted if name != "RAY_AUTH_TOKEN"]
    printed = world.cluster.submit("python", "-c", SEEN.replace("NAMES", repr(names)))
    (line,) = (line for line in printed.splitlines() if line.startswith("SEEN"))
    expected = {name: hashlib.sha256(world.planted[name].encode()).hexdigest() for name in names}
    assert json.loads(line.removeprefix("SEEN")) == dict.fromkeys(
        ("driver", "127.0.0.2", "127.0.0.3"), expected
    )


@pytest.fixture(scope="module")
def ran(world: World) -> World:
    """After all jobs from an index to upscaled pictures."""
    submit, places = world.cluster.submit, world.places()
    assert "5 pictures indexed" in submit("python", "-m", "pipelines.index", f"{world.bucket}/photos")
    submit("python", "-m", "pipelines.tune", *places)
    best = f"{world.bucket}/runs/{world.name}-tune/best.json"
    submit("python", "-m", "pipelines.train", "--config", best, CTMSR_COMMIT=COMMIT)
    printed = submit("python", "-m", "pipelines.register", *places)
    assert "models:/ctmsr-x4@challenger is version 1" in printed
    assert "not promoted: worse than bicubic: " in printed
    submit(
        *("python", "-m", "pipelines.upscale", f"{world.bucket}/small"),
        *("--output", f"{world.bucket}/large", "--tracking-uri", world.mlflow.url),
        *("--model", "models:/ctmsr-x4@challenger"),
    )
    return world


def test_from_pictures_to_upscaled_pictures_by_jobs(ran: World) -> None:
    found = find(f"{ran.bucket}/runs/{ran.name}")
    assert (found.step, found.meta["num_workers"]) == (4, 2)  # a node has no room for both
    assert found.meta["commit"] == COMMIT  # as nothing else could tell it
    client = MlflowClient(ran.mlflow.url)
    assert client.get_model_version("ctmsr-x4", "1").tags["lineage.commit"] == COMMIT
    assert client.get_model_version_by_alias("ctmsr-x4", "challenger").version == "1"
    large = {str(path) for path in list_sizes(f"{ran.bucket}/large")}
    assert large == {f"{number:02d}_x4.png" for number in range(NUM_SMALL)}
    picture = ran.s3.client.get_object(Bucket=ran.bucket.removeprefix("s3://"), Key="large/00_x4.png")
    assert decode(picture["Body"].read(), name="00_x4.png").shape == (48, 64, 3)


def test_a_job_carries_the_code_and_nothing_else(ran: World) -> None:
    copies = "*/session_latest/runtime_resources/working_dir_files/_ray_pkg_*/"
    sent = list(ran.cluster.ray_folder.glob(copies))
    assert {folder.relative_to(ran.cluster.ray_folder).parts[0] for folder in sent} == {
        "127.0.0.2",
        "127.0.0.3",
    }
    for folder in sent:
        assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"ctmsr", "pipelines", "LICENSE"}
        code = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert sum(path.stat().st_size for path in code if path.parent.name != "starter") < 1_000_000


def test_no_secret_is_in_anything_that_was_written(ran: World) -> None:
    jobs = ran.cluster.ray("job", "list")
    written = {
        "the bucket": objects(ran.s3, ran.bucket.removeprefix("s3://")),
        "the session": files(ran.cluster.ray_folder),
        "job metadata": [("ray job list", (jobs.stdout + jobs.stderr).encode())],
        "the folder": [item for item in files(ran.folder) if item[0] != f"{ran.cluster.folder}/token"],
    }
    needles, canary = ran.needles(), ran.name.encode()
    found = []
    for place, items in written.items():
        known = list(items)
        assert any(canary in data for _, data in known), place
        found += [(name, what) for name, data in known for what, text in needles.items() if text in data]
    assert not found


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        ("0" * 64, 403, "the authentication token is invalid or incorrect"),
        (None, 401, "no authentication token was found"),
    ],
    ids=["wrong", "missing"],
)
def test_a_wrong_or_missing_token_is_refused(
    world: World, tmp_path: Path, token: str | None, status: int, said: str
) -> None:
    env = dict(world.cluster.env) | {"HOME": str(tmp_path)}  # where Ray looks for a token, too
    del env["RAY_AUTH_TOKEN_PATH"]
    headers = {}
    if token:
        (tmp_path / "token").write_text(token)
        env["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
        headers["Authorization"] = f"Bearer {token}"
    else:
        del env["RAY_AUTH_MODE"]
    request = urllib.request.Request(f"{env['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == status
    job = world.cluster.ray("job", "submit", "--", "true", env=env)
    assert job.returncode == 1
    assert said in job.stderr + job.stdout
    command = ["-m", "pipelines.index", f"{world.bucket}/photos", "--out", f"{world.bucket}/refused.index"]
    driver = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert driver.returncode == 2, driver.stderr
    *warnings, error = driver.stderr.splitlines()
    assert error.startswith(
        f"error: the Ray cluster at RAY_ADDRESS={env['RAY_ADDRESS']} requires a token, and"
    )
    assert len(warnings) <= 3  # from Ray, one per attempt
    assert not token or token not in driver.stderr + job.stderr + job.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "storage_uri=runs"),
        ("index s3://b/photos --out here.index", "--out=here.index"),
        ("upscale s3://b/small --output here", "--output=here"),
    ],
)
def test_a_job_that_would_write_into_a_copy_of_the_folder_is_refused(
    world: World, command: str, said: str
) -> None:
    options = ["--working-dir", ".", "--", "python", "-m", *f"pipelines.{command}".split()]
    done = world.cluster.ray("job", "submit", *options)
    assert done.returncode == 1
    assert f"error: {said} is a relative path, and this job runs in a copy" in done.stdout


def test_a_login_in_the_tracking_address_is_refused_before_it_is_written(ran: World) -> None:
    password = f"planted-{secrets.token_hex(12)}"
    uri = ran.mlflow.url.replace("://", f"://somebody:{password}@")
    name = f"login-{secrets.token_hex(6)}"
    options = [*ran.places()[:-1], uri, "--set", f"name={name}"]
    for module in ("train", "tune"):
        command = [sys.executable, "-m", f"pipelines.{module}", *options]
        done = subprocess.run(command, cwd=ROOT, env=dict(ran.cluster.env), capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: tracking_uri has a login in it (user:password@)")
        assert password not in done.stdout + done.stderr
    everything = [*objects(ran.s3, ran.bucket.removeprefix("s3://")), *files(ran.folder)]
    everything += files(ran.cluster.ray_folder)
    assert not [where for where, data in everything if password.encode() in data or name in where]


def test_a_half_started_cluster_is_ended_and_nothing_stays(tmp_path: Path) -> None:
    ports = ["--port", str(free_port()), "--dashboard-port", str(free_port())]
    command = ["-m", "cluster.local", "up", "--folder", str(tmp_path / "half"), "--cpus", "1", *ports]
    head = tmp_path / "half" / "127.0.0.2.log"
    with Child([sys.executable, *command], shell_env(), tmp_path / "up.log") as starting:
        starting.wait_until(
            lambda: (head.exists() and "Local node IP" in head.read_text()) or None, "head", timeout_s=60
        )
        starting.kill()
    record = json.loads((tmp_path / "half" / "cluster.json").read_text())
    assert "2 nodes" not in starting.printed()
    done = local("down", tmp_path / "half", env=shell_env())
    assert (done.returncode, done.stdout) == (0, f"{len(record['pids'])} nodes ended.\n")
    assert marked(record["mark"]) == []
    assert not Path(record["ray_folder"]).exists()
    again = local("down", tmp_path / "half", env=shell_env())
    assert (again.returncode, again.stdout) == (0, f"no cluster is up in {tmp_path / 'half'}.\n")


def marked(mark: str) -> list[str]:
    """Processes whose environment holds the mark."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                found.append(environ.parent.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def files(folder: Path) -> Iterable[tuple[str, bytes]]:
    """Every file below a folder, by path."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()


def objects(s3: S3, bucket: str) -> Iterable[tuple[str, bytes]]:
    """Every object in a bucket, by key."""
    for page in s3.client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", []):
            yield item["Key"], s3.client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
