"""A long training under watch: what a run holds must not grow with its length: `python -m tests.soak`

Trains for two hours, by default, on a Ray head and two nodes of this machine, from an S3 server behind a
proxy and with an MLflow server, as the fault drill does. Every few seconds it reads what each kind of process
holds. In the end it prints the medians of a while after the tenth minute and of as long at the end. The exit
status is 1 if one of them has grown by more than 3 %. Needs root, as the drill does.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.drill.world import BUCKET, World, world
from tests.soak.curves import ALLOWED, Sample, curves, grown, table
from tests.soak.watch import watch
from tests.support.child import Child
from tests.support.training_command import start_training

SETTLED_MIN = 10.0
EVERY_S = 15.0
RAY_HISTORIES = {
    "RAY_task_events_max_num_task_in_gcs": "1000",
    "RAY_maximum_gcs_dead_worker_cached_count": "20",
    "RAY_maximum_gcs_destroyed_actor_cached_count": "20",
    "RAY_LOG_MONITOR_MAX_OPEN_FILES": "20",
}
"""What Ray's servers remember of tasks, workers, actors and logs: by default more than a soak would fill."""


def train(there: World) -> Child:
    """Starts a run that is longer than any soak; it scores, saves and forgets checkpoints all the while."""
    settings = [
        "name=soak",
        f"storage_uri={BUCKET}/runs",
        f"tracking_uri={there.mlflow.url}",
        *(f"data.{part}_uri={BUCKET}/photos" for part in ("train", "val", "test")),
        "optim.ct_steps=10000000",
        "train.num_workers=2",
        "train.log_every_steps=20",
        "train.checkpoint_every_steps=200",
    ]
    return start_training(settings, there.nodes.driver_env, there.folder / "soak.log")


def soak(there: World, minutes: float) -> list[Sample]:
    """Samples of `minutes` of training, from its first checkpoint on."""
    samples: list[Sample] = []
    with train(there) as command:
        command.wait_until_printed("step 200", timeout_s=600)
        started, told = time.monotonic(), 0.0
        while (passed := time.monotonic() - started) < 60 * minutes:
            if (status := command.status()) is not None:
                raise RuntimeError(f"the training ended with {status}. {command.log_tail()}")
            samples.append(watch(there, command.pid, passed / 60))
            if passed - told >= 300:
                told = passed
                print(f"{passed / 60:4.0f} min  {samples[-1].line()}", flush=True)
            time.sleep(EVERY_S)
    return samples


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=120, help="default %(default)s")
    parser.add_argument("--folder", type=Path, help="a new folder to keep the logs in")
    arguments = parser.parse_args()
    if arguments.minutes < 2 * SETTLED_MIN:
        parser.error(f"--minutes must be at least {2 * SETTLED_MIN:g}, got {arguments.minutes:g}")
    if os.geteuid() != 0:
        parser.error("only root can mount the small disk of the nodes")
    os.environ |= RAY_HISTORIES
    with ExitStack() as stack:
        if arguments.folder:
            arguments.folder.mkdir(parents=True)
        scratch = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="soak"))
        there = stack.enter_context(world(Path(scratch).absolute()))
        samples = soak(there, arguments.minutes)
    found = curves(samples, SETTLED_MIN)
    print(table(found))
    if more := grown(found):
        print(f"grew by more than {ALLOWED - 1:.0%}: {', '.join(more)}", file=sys.stderr)
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
