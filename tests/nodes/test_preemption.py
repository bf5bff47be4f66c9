"""A node that gets notice, as spot machines do: a checkpoint is written before it goes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.infra.checkpoints import Stored, find, newest
from tests.conftest import S3
from tests.support.servers.ray_nodes import TRAIN_WORKER, RayNodes
from tests.support.training_command import NUM_CPUS, start_training

pytestmark = pytest.mark.tier

EVERY = 10
"""Steps between two checkpoints in their turn."""
IDS = """
import json, ray
ray.init()
print(json.dumps({node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes()}))
"""


def test_a_node_that_gets_notice_leaves_a_checkpoint(
    s3: S3, photos: dict[str, bytes], tmp_path: Path
) -> None:
    bucket = s3.make_bucket("notice", {f"photos/{name}": data for name, data in photos.items()})
    settings = [f"data.{part}_uri={bucket}/photos" for part in ("train", "val", "test")]
    settings += ["name=notice", f"storage_uri={bucket}/runs", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db"]
    settings += ["train.num_workers=1", "optim.ct_steps=300", "optim.dtm_steps=0"]
    run_uri = f"{bucket}/runs/notice"
    with RayNodes(tmp_path, num_cpus=0, env={}) as nodes:
        added = {f"127.0.0.{number}": nodes.add(NUM_CPUS + 1) for number in (3, 4)}
        with start_training(settings, nodes.driver_env, tmp_path / "notice.log") as command:
            command.wait_until(lambda: newest(run_uri), "checkpoint", timeout_s=120)
            (address,) = [where for where, node in added.items() if node.pids(TRAIN_WORKER)]
            give_notice(nodes, address, deadline_s=25)

            def out_of_turn() -> Stored | None:
                found = newest(run_uri)
                return found if found and found.step % EVERY else None

            command.wait_until(out_of_turn, "checkpoint out of turn", timeout_s=25)
            command.wait_until(command.status, "end", timeout_s=240)
            assert command.status() == 0, command.log_tail()
    assert find(run_uri).step == 300


def give_notice(nodes: RayNodes, address: str, deadline_s: int) -> None:
    """What a cloud's spot handler tells Ray."""
    ids = json.loads(ray_python(nodes, "-c", IDS).splitlines()[-1])
    options = ["--address", nodes.address, "--node-id", ids[address]]
    options += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    options += ["--deadline-remaining-seconds", str(deadline_s)]
    ray_python(nodes, "-m", "ray.scripts.scripts", "drain-node", *options)


def ray_python(nodes: RayNodes, *arguments: str) -> str:
    """Output of Python on the head."""
    done = subprocess.run(
        [sys.executable, *arguments], env=nodes.driver_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
