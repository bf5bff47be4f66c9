"""What scoring checkpoints costs the training: `python -m tests.benchmarks.scoring`.

One run saves a checkpoint again and again, and each is scored while the run goes on. The held-out pictures
lie in a store that answers after two seconds, so scoring takes about half of the time. The training worker
has a core of its own, as it has on a cluster; everything else shares the others. The last line is the ratio
of steps/s while a checkpoint is scored, from its saving on, to steps/s from then to the next checkpoint:
medians of short stretches of the run. Those in which a checkpoint is saved count for neither.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
import skimage.data

from ctmsr.image import encode_png
from pipelines.config.run_config import RunConfig
from pipelines.infra.cluster import ray_cluster
from pipelines.tracking.runs import connect
from tests.support.runs import run_config, run_named, run_to_end
from tests.support.servers.fault_proxy import fault_proxy

from .fetch import serve
from .memory import processes

HELD_OUT = 120
LOG_EVERY = 5
SETTLED = 100
"""Steps after which the run is at its usual speed."""


@dataclass(frozen=True)
class Stretch:
    """Some steps of the run, between two lines of its log; times in seconds since the epoch."""

    first_step: int
    start: float
    end: float


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6400, help="of the run; default %(default)s")
    parser.add_argument("--every", type=int, default=800, help="steps to a checkpoint; default %(default)s")
    arguments = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True).start()
    scored_at: list[float] = []
    threading.Thread(target=keep_apart, args=(os.getpid(), scored_at), daemon=True).start()
    crops = [getattr(skimage.data, name)()[:128, :128] for name in ("astronaut", "chelsea", "coffee")]
    with fault_proxy(endpoint := ours.recv(), {}) as proxy, tempfile.TemporaryDirectory() as scratch:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="held-out")
        for number in range(HELD_OUT):
            photo = encode_png(crops[number % len(crops)])
            client.put_object(Bucket="held-out", Key=f"{number:03d}.png", Body=photo)
        folder = Path(scratch)
        (folder / "photos").mkdir()
        for number, crop in enumerate(crops):
            (folder / f"photos/{number}.png").write_bytes(encode_png(crop))
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        proxy.change({"stall": 1.0})
        with ray_cluster():
            run = config(folder, arguments.steps, arguments.every)
            run_to_end(run)
            history = stretches(run)
    ours.send("end")
    report(history, scored_at, arguments.every)


def keep_apart(root: int, scored_at: list[float]) -> None:
    """Gives the training worker the first core, and everything else below `root` the others.

    Adds to `scored_at` the times at which a process scores.
    """
    first, *others = sorted(os.sched_getaffinity(root))
    while True:
        for pid in processes(root):
            with suppress(OSError):  # ended in the meantime
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                if title.startswith(b"ray::run_validation"):
                    scored_at.append(time.time())
                is_worker = title.startswith(b"ray::RayTrainWorker")
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), [first] if is_worker else others)
        time.sleep(0.2)


def config(folder: Path, steps: int, every: int) -> RunConfig:
    """A run whose pictures and checkpoints are local, but for the held-out ones."""
    settings = {
        "name": "scored",
        "storage_uri": f"{folder}/runs",
        "data.train_uri": f"{folder}/photos",
        "data.val_uri": "s3://held-out",
        "optim.ct_steps": steps,
        "optim.dtm_steps": 0,
        "train.log_every_steps": LOG_EVERY,
        "train.checkpoint_every_steps": every,
        "train.num_workers": 1,
    }
    return run_config("", folder, *(f"{key}={value}" for key, value in settings.items()))


def stretches(run: RunConfig) -> list[Stretch]:
    """Those of the run once it has settled."""
    found = run_named(run.name, run)
    points = connect(run.tracking_uri).get_metric_history(found.info.run_id, "images_per_s")
    pairs = itertools.pairwise(point for point in points if point.step >= SETTLED)
    return [Stretch(one.step, one.timestamp / 1000, other.timestamp / 1000) for one, other in pairs]


def report(history: list[Stretch], scored_at: list[float], every: int) -> None:
    """Prints steps/s with and without scoring, and their ratio."""
    with_s, without_s = list[float](), list[float]()
    for _, group in itertools.groupby(history, lambda one: one.first_step // every):
        between = list(group)[1:-1]  # without the ones in which the run saves
        during = [at for at in scored_at if between and between[0].start < at < between[-1].end]
        for one in between if during else []:
            (with_s if one.start < max(during) else without_s).append(one.end - one.start)
    scored, plain = (LOG_EVERY / statistics.median(each) for each in (with_s, without_s))
    print(f"steps/s while a checkpoint is scored {scored:.2f} ({len(with_s)} stretches of {LOG_EVERY} steps)")
    print(f"steps/s while none is                {plain:.2f} ({len(without_s)} stretches)")
    print(f"ratio {scored / plain:.3f}")


if __name__ == "__main__":
    main()
