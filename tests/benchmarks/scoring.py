"""What scoring checkpoints costs the training: `python -m tests.benchmarks.scoring`.

Runs take turns: one that has a checkpoint scored meanwhile, and one that makes none until its end. The held-out
pictures lie in a store that answers after two seconds, so that scoring takes half a minute, but no core. The
last line is the ratio of the images/s of training, medians over the stretches that the run reports after the
checkpoint of the first run.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import skimage.data

from ctmsr.image import encode_png
from pipelines.config.run_config import RunConfig
from pipelines.infra.cluster import ray_cluster
from pipelines.tracking.runs import connect
from tests.support.runs import run_config, run_named, run_to_end
from tests.support.servers.fault_proxy import fault_proxy

from .store import bucket

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
    crops = [getattr(skimage.data, name)()[:128, :128] for name in ("astronaut", "chelsea", "coffee")]
    files = {f"val/{i:03d}.png": encode_png(crops[i % len(crops)]) for i in range(HELD_OUT)}
    with bucket(files) as place, fault_proxy(os.environ["AWS_ENDPOINT_URL"], {"stall": 1.0}) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        with ray_cluster(), tempfile.TemporaryDirectory() as scratch:
            for i, crop in enumerate(crops):
                photo = Path(scratch, "photos", f"{i}.png")
                photo.parent.mkdir(exist_ok=True)
                photo.write_bytes(encode_png(crop))
            rates = [
                tuple(rate(config(place, Path(scratch), arguments.steps, f"{kind}-{i}", kind == "scored"))
                for kind in ("scored", "plain"))
                for i in range(arguments.rounds)
            ]
    for scored, plain in rates:
        print(f"images/s while a checkpoint is scored {scored:.2f}, and without {plain:.2f}")
    print(f"ratio {statistics.median(scored / plain for scored, plain in rates):.3f}")


def config(place: str, folder: Path, steps: int, name: str, is_scored: bool) -> RunConfig:
    """A run whose pictures and checkpoints are local, but for the held-out ones."""
    settings = [f"name={name}", f"storage_uri={folder}/runs", f"data.train_uri={folder}/photos"]
    settings += [f"data.val_uri={place}/val", f"optim.ct_steps={steps}", "optim.dtm_steps=0"]
    settings += [f"train.log_every_steps={LOG_EVERY}", "train.num_workers=1"]
    settings += [f"train.checkpoint_every_steps={steps - LOG_EVERY if is_scored else steps}"]
    return run_config(place, folder, *settings)
