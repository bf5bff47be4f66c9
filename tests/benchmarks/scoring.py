"""What scoring checkpoints costs the training: `python -m tests.benchmarks.scoring`.

Runs take turns: one whose checkpoint is scored while it goes on, and one without a checkpoint until its end.
The held-out pictures lie in a store that answers after two seconds. The training worker has a core of its
own, as it has on a cluster; everything else shares the other one. The last line is the ratio of their
images/s, all time included: each run's is the median of the stretches that it reports after the checkpoint of
the first.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from contextlib import suppress
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

HELD_OUT = 160
LOG_EVERY = 20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind; default %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of a run; default %(default)s")
    arguments = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True).start()
    threading.Thread(target=keep_apart, args=(os.getpid(),), daemon=True).start()
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
            pairs = [
                [rate(config(folder, arguments.steps, number, is_scored)) for is_scored in (True, False)]
                for number in range(arguments.rounds)
            ]
    ours.send("end")
    for scored, plain in pairs:
        print(f"images/s while a checkpoint is scored {scored:.2f}, and without {plain:.2f}")
    print(f"ratio {statistics.median(scored / plain for scored, plain in pairs):.3f}")


def keep_apart(root: int) -> None:
    """Gives training workers the first core, and everything else below `root` the others."""
    first, *others = sorted(os.sched_getaffinity(root))
    while True:
        for pid in processes(root):
            with suppress(OSError):  # ended in the meantime
                is_worker = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker")
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), [first] if is_worker else others)
        time.sleep(0.2)


def config(folder: Path, steps: int, number: int, is_scored: bool) -> RunConfig:
    """A run whose pictures and checkpoints are local, but for the held-out ones."""
    settings = {
        "name": f"{'scored' if is_scored else 'plain'}-{number}",
        "storage_uri": f"{folder}/runs",
        "data.train_uri": f"{folder}/photos",
        "data.val_uri": "s3://held-out",
        "optim.ct_steps": steps,
        "optim.dtm_steps": 0,
        "train.log_every_steps": LOG_EVERY,
        "train.checkpoint_every_steps": steps // 4 if is_scored else steps,
        "train.num_workers": 1,
    }
    return run_config("", folder, *(f"{key}={value}" for key, value in settings.items()))


def rate(run: RunConfig) -> float:
    """Images/s of a run in its stretches after the first quarter, all of them before the last checkpoint."""
    run_to_end(run)
    found = run_named(run.name, run)
    points = connect(run.tracking_uri).get_metric_history(found.info.run_id, "images_per_s")
    quarter = run.optim.ct_steps // 4
    return statistics.median(point.value for point in points if quarter < point.step <= 2 * quarter)


if __name__ == "__main__":
    main()
