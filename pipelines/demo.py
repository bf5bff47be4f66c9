"""The whole system on real photographs, on this machine: `make demo`.

Starts an S3 server on loopback, uploads photographs that ship with scikit-image and scikit-learn, then only
calls the other pipelines: tune, train, evaluate, register and, in a new process, upscale. The starter model
is fine-tuned, and beside it the same network is trained from scratch for as many steps.
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import boto3
import numpy as np

from ctmsr.config import from_dict, override, to_dict
from ctmsr.degradation.recipe import degrade
from ctmsr.image import center_crop, decode, encode_png
from ctmsr.metrics.scoring import bicubic, table
from ctmsr.rng import sample_rng

from .config.presets import PRESETS
from .config.run_config import RunConfig
from .data.held_out import find_held_out
from .evaluate.run import evaluate, write_report
from .infra.checkpoints import STARTER, fetched
from .infra.cluster import ray_cluster
from .infra.exit_status import run
from .infra.progress import progress_line
from .register.comparison import find_comparison
from .register.run import register
from .tracking.released import find_released
from .train.run import check_inputs, train
from .tune.run import search
from .tune.space import check_space

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


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="emptied first; default %(default)s"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C
    shutil.rmtree(arguments.output, ignore_errors=True)
    config = demo_config(arguments.output, arguments.overrides)
    check_space(config)
    with s3_server():
        upload_photos()
        picture = run_pipelines(config, arguments.output)
    print(f"\npicture    {picture}  (bicubic | from scratch | fine-tuned | HR)")
    print(f"took       {time.monotonic() - started:.0f} s")
    print_next(config, arguments.output)
    return 0


def demo_config(output: Path, overrides: list[str]) -> RunConfig:
    """The `small` preset on the demo's bucket, from the starter on, which needs smaller steps."""
    places = {
        "name": "fine-tuned",
        "init_uri": STARTER,
        "optim.lr": 1e-4,
        "storage_uri": f"s3://{BUCKET}/runs",
        "tracking_uri": f"sqlite:///{output}/mlflow.db",
        **{f"data.{part}_uri": f"s3://{BUCKET}/photos/{part}" for part in PHOTOS},
    }
    assignments = [f"{key}={value}" for key, value in places.items()]
    return from_dict(RunConfig, override(to_dict(PRESETS["small"]()), [*assignments, *overrides]))


def run_pipelines(config: RunConfig, output: Path) -> Path:
    """tune -> train -> evaluate -> register -> upscale; returns the comparison picture."""
    inputs = check_inputs(config)
    held_out = find_held_out(config.data)
    with ray_cluster():
        announce("tune", f"{config.tune.num_trials} noise schedules, {config.tune.ct_steps} steps each")
        with progress_line() as progress:
            found = search(config, inputs, progress)
        print(found.report)

        configs = {"from scratch": from_scratch(found.config), "fine-tuned": found.config}
        outcomes, evaluations = {}, {}
        for name, one in configs.items():
            announce("train", f"{name}, {one.train.num_workers} workers, {one.optim.total_steps} steps")
            with progress_line() as progress:
                outcomes[name] = train(one, check_inputs(one), progress)

        announce("evaluate", f"{len(PHOTOS['test'])} photographs that were not trained on")
        for name, one in configs.items():
            evaluations[name] = evaluate(one, outcomes[name].checkpoint_uri, held_out)
            write_report(one, outcomes[name].checkpoint_uri, held_out, evaluations[name])
        print(table(evaluations))

        announce("register", f"the fine-tuned model, compared with bicubic, in MLflow as {config.model_name}")
        outcome = outcomes["fine-tuned"]
        with fetched(outcome.checkpoint_uri) as folder:
            decision = register(
                folder,
                tracking_uri=inputs.tracking_uri,
                model_name=config.model_name,
                run_id=outcome.run_id,
                metrics=evaluations["fine-tuned"].means,
                tags={"data.test_uri": config.data.test_uri},
                rule=config.register,
                comparison=find_comparison(config),
            )
        print(f"version {decision.version}: {decision.reason}")

    announce("upscale", "a new process pulls the champion from MLflow")
    return compare(config, outcomes["from scratch"].checkpoint_uri, output)


def from_scratch(config: RunConfig) -> RunConfig:
    """The same run without the starter, at the learning rate of random weights."""
    optim = replace(config.optim, lr=PRESETS["small"]().optim.lr)
    return replace(config, name="from-scratch", init_uri="", optim=optim)


def compare(config: RunConfig, from_scratch_uri: str, output: Path) -> Path:
    """Degrades the held-out photographs, has both models upscale them, and shows each beside HR."""
    lq_folder = output / "lq"
    lq_folder.mkdir()
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in PHOTOS["test"]:
        hr_u8 = center_crop(decode(_photo(name), name=name), config.data.eval_crop_size, name=name)
        rng = sample_rng(0, 0, name, "demo")
        lq_u8 = degrade(hr_u8, scale=config.network.scale, config=config.degradation, rng=rng)
        pairs[Path(name).stem] = (hr_u8, lq_u8)
        (lq_folder / f"{Path(name).stem}.png").write_bytes(encode_png(lq_u8))
    command = ["-m", "pipelines.upscale", str(lq_folder), "--output", str(output)]
    subprocess.run([sys.executable, *command, "--tracking-uri", config.tracking_uri], check=True)
    untaught = find_released(from_scratch_uri, config.tracking_uri).load()
    scale, rows = config.network.scale, []
    for stem, (hr_u8, lq_u8) in pairs.items():
        fine_tuned = decode((output / f"{stem}_x{scale}.png").read_bytes(), name=stem)
        rows.append(np.hstack([bicubic(lq_u8, scale), untaught(lq_u8, 0), fine_tuned, hr_u8]))
    picture = output / "comparison.png"
    picture.write_bytes(encode_png(np.vstack(rows)))
    return picture


def upload_photos() -> None:
    """Makes the bucket and puts the photographs in it, by part."""
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for part, names in PHOTOS.items():
        for name in names:
            client.put_object(Bucket=BUCKET, Key=f"photos/{part}/{name}", Body=_photo(name))
    held_out = len(PHOTOS["val"]) + len(PHOTOS["test"])
    print(
        f"uploaded {len(PHOTOS['train'])} photographs to train on and {held_out} held out to s3://{BUCKET}/photos"
    )


@contextmanager
def s3_server() -> Iterator[None]:
    """An S3 server on loopback, in memory; the standard AWS variables point to it."""
    from moto.server import ThreadedMotoServer

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


def announce(command: str, what: str) -> None:
    """A heading with the pipeline that comes next."""
    print(f"\npython -m pipelines.{command}: {what}", flush=True)


def print_next(config: RunConfig, output: Path) -> None:
    """The commands to try next."""
    print(f"""
next, with your own pictures:
  .venv/bin/python -m pipelines.upscale PHOTO --output upscaled --tracking-uri {config.tracking_uri}
  .venv/bin/python -m pipelines.train --set name=mine --set data.train_uri=FOLDER --set data.val_uri=FOLDER
  .venv/bin/mlflow ui --backend-store-uri {config.tracking_uri}""")


def _photo(name: str) -> bytes:
    for package, folder in (("skimage.data", "."), ("sklearn.datasets", "images")):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent / folder / name
        if path.is_file():
            return path.read_bytes()
    raise FileNotFoundError(name)


if __name__ == "__main__":
    run(main)
