"""Train a model, CT then DTM, on Ray Train workers: `python -m pipelines.train --help`."""

import json
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, DataConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from ctmsr import checkpoint
from ctmsr.config import check, flatten, from_dict, to_dict
from ctmsr.errors import ConfigError, UserError
from ctmsr.network import ConsistencyModel
from ctmsr.perceptual import load_lpips
from ctmsr.rng import sample_seed
from ctmsr.train_state import TrainState, build_state, restore_state, state_tensors
from ctmsr.train_step import Batch, check_finite, train_step

from .batches import Intake, make_batch
from .cli import config_parser, print_config, resolve
from .cluster import check_gpus, ray_cluster
from .command import root_cause, run
from .config import RunConfig
from .data import check_images, execution_options, train_stream, val_samples
from .evaluate import local_checkpoint
from .monitor import Monitor
from .pictures import Pictures, find_pictures
from .progress import progress_line
from .storage import newest_checkpoint, open_uri, read_bytes, write_bytes
from .tracking import ensure_experiment, preflight, tracked_run

EXAMPLES = """\
  a small model from a folder of photos, on this machine:
    python -m pipelines.train --set name=first --set data.train_uri=photos/train --set data.val_uri=photos/val
  the published run, from a bucket, on the cluster of RAY_ADDRESS:
    python -m pipelines.train --preset published --set storage_uri=s3://bucket/runs \\
        --set data.train_uri=s3://bucket/train --set data.val_uri=s3://bucket/val --tracking-uri http://mlflow:5000

The same command again continues a run that stopped."""

FREE_TO_CHANGE = (
    "train.",
    "tune.",
    "storage_uri",
    "tracking_uri",
    "experiment",
    "model_name",
    "inference.",
    "data.",
)
"""Keys that may differ when a run continues: they do not change what is computed."""


@dataclass(frozen=True)
class Inputs:
    """What was found before anything expensive started."""

    train: Pictures
    val: Pictures
    tracking_uri: str


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    checkpoint_uri: str
    metrics: dict[str, float]
    """Of the EMA weights on data.val_uri."""
    run_id: str
    """In MLflow."""


def check_inputs(config: RunConfig) -> Inputs:
    """Everything that can be wrong with a run's surroundings, found within seconds and without Ray.

    Last, the resolved config is written into the run's folder, which finds a place that refuses it.

    Raises:
        UserError: Pictures, storage, backbones or MLflow cannot be used, or the run has another config.
    """
    check_gpus(config.train)
    pictures, val = find_pictures(config.data.train_uri), find_pictures(config.data.val_uri)
    check_images(pictures, hr_crop_size=config.network.hr_size)
    check_images(val, hr_crop_size=config.data.eval_crop_size)
    for place in (pictures, val):
        check(
            place.scale in (None, config.network.scale),
            f"the LR pictures of {place.uri} are {place.scale} times smaller, network.scale is "
            f"{config.network.scale}. Set it to {place.scale}, or name other pictures.",
        )
    for net in ("vgg", "alex"):
        load_lpips(net)
    _refuse_changed_run(config, pictures)
    tracking_uri = preflight(config.tracking_uri)
    write_bytes(f"{config.run_uri}/config.json", (json.dumps(to_dict(config), indent=2) + "\n").encode())
    return Inputs(pictures, val, tracking_uri)


def train(config: RunConfig, inputs: Inputs, progress: Queue, parent_run_id: str | None = None) -> Outcome:
    """Runs the training to its end, or from its newest checkpoint on.

    Raises:
        UserError: The training failed; the message is the cause.
    """
    experiment_id = ensure_experiment(inputs.tracking_uri, config.experiment)
    tags = {
        "storage": config.run_uri,
        "train_pictures": str(len(inputs.train)),
        "train_version": inputs.train.version,
        "val_version": inputs.val.version,
    }
    with tracked_run(
        inputs.tracking_uri,
        experiment_id,
        config.name,
        params=to_dict(config),
        tags=tags,
        parent_run_id=parent_run_id,
    ) as run_id:
        if _steps_done(config) < config.optim.total_steps:
            fit(build_trainer(config, inputs, progress, run_id))
    checkpoint_uri = newest_checkpoint(config.run_uri)
    assert checkpoint_uri is not None  # the last step writes one
    return Outcome(checkpoint_uri, _manifest(checkpoint_uri)["meta"]["metrics"], run_id)


def fit(trainer: TorchTrainer) -> ray.train.Result:
    """Runs a trainer to its end.

    Raises:
        UserError: Workers failed more often than train.max_failures; the message is their error alone.
    """
    try:
        with _keyboard_interrupt():
            return trainer.fit()
    except ray.train.WorkerGroupError as error:
        causes = {f"rank {rank}: {root_cause(failure)}" for rank, failure in error.worker_failures.items()}
        raise UserError(f"training failed. {' '.join(sorted(causes))}") from error
    except ray.train.ControllerError as error:
        raise UserError(f"training failed. {root_cause(error)}") from error


@contextmanager
def _keyboard_interrupt() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt: Ray Train's own handler exits with 0, and outlives its run."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # a trial runs in another, without a handler
            signal.signal(signal.SIGINT, before)


def build_trainer(
    config: RunConfig, inputs: Inputs, progress: Queue, run_id: str, callbacks: Sequence[Any] = ()
) -> TorchTrainer:
    """The one trainer of the project; a Tune trial is one of these, too."""
    file_system, storage_path = open_uri(config.storage_uri)
    resources = {"CPU": config.train.cpus_per_worker} | ({"GPU": 1} if config.train.use_gpu else {})

    def train_samples() -> ray.data.Dataset:  # called whenever a group of workers starts
        return train_stream(
            inputs.train,
            hr_crop_size=config.network.hr_size,
            scale=config.network.scale,
            degradation=config.degradation,
            seed=config.seed,
            skip=_steps_done(config) * config.train.global_batch_size,
            total=config.optim.total_steps * config.train.global_batch_size,
            global_batch_size=config.train.global_batch_size,
            num_workers=config.train.num_workers,
        )

    def held_out() -> ray.data.Dataset:
        return val_samples(
            inputs.val,
            hr_crop_size=config.data.eval_crop_size,
            num_draws=config.data.eval_draws,
            scale=config.network.scale,
            degradation=config.degradation,
        )

    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": to_dict(config),
            "tracking_uri": inputs.tracking_uri,
            "run_id": run_id,
            "progress": progress,
            "num_pictures": len(inputs.train),
            "train_version": inputs.train.version,
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers, use_gpu=config.train.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=storage_path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.num_checkpoints_kept),
            callbacks=list(callbacks),
        ),
        datasets={"train": train_samples, "val": held_out},
        dataset_config=DataConfig(datasets_to_split=["train"], execution_options=execution_options()),
    )


def train_loop_per_worker(loop: Mapping[str, Any]) -> None:
    """What every Ray Train worker runs."""
    config = from_dict(RunConfig, loop["config"])
    is_leader = ray.train.get_context().get_world_rank() == 0
    device = ray.train.torch.get_device()
    state = _initial_state(config)
    lpips = load_lpips("vgg").to(device)
    intake = Intake(config, loop["num_pictures"], loop["progress"])
    monitor = Monitor(config, loop, intake) if is_leader else None
    batches = _batches(config, device, intake)
    while state.global_step < config.optim.total_steps:
        started = time.monotonic()
        batch = next(batches)
        waited_s = time.monotonic() - started
        assert batch.samples[0] // config.train.global_batch_size == state.global_step
        losses = train_step(state, batch, config.recipe, lpips)
        if monitor:
            monitor.step(state, losses, waited_s)
        done = state.global_step == config.optim.total_steps
        if done or state.global_step % config.train.checkpoint_every_steps == 0:
            check_finite(state)
            _report(config, state, monitor, loop["train_version"])
    if monitor:
        monitor.close()


def _initial_state(config: RunConfig) -> TrainState:
    torch.manual_seed(sample_seed(config.seed, "weights"))
    network = ConsistencyModel(config.network)
    network.bf16 = config.train.precision == "bf16"
    network.model.recompute = config.train.activation_checkpointing
    if config.train.use_gpu:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parallel = ray.train.torch.prepare_model(network, parallel_strategy_kwargs={"broadcast_buffers": False})
    model = getattr(parallel, "module", parallel)  # DDP wraps where there is more than one worker
    assert isinstance(model, ConsistencyModel)
    state = build_state(model, config.optim, parallel)
    # Not `ray.train.get_checkpoint`: of a checkpoint that is stored, but that Ray has not counted yet when a
    # worker dies, the data stream would know and the workers would not.
    if found := newest_checkpoint(config.run_uri):
        with local_checkpoint(found) as folder:
            ema, _ = checkpoint.load_model(folder)
            restore_state(state, ema, checkpoint.load_train_state(folder))
    if config.train.compile:
        state.model.model.compile()
    return state


def _batches(config: RunConfig, device: torch.device, intake: Intake) -> Iterator[Batch]:
    """This worker's part of every batch, without end: one iteration of the stream is a bounded part of it."""
    shard = ray.train.get_dataset_shard("train")
    while True:
        num_batches = 0
        for rows in shard.iter_batches(
            batch_size=config.train.per_worker_batch_size, batch_format="numpy", drop_last=True
        ):
            num_batches += 1
            intake.count(rows)
            yield make_batch(rows, device)
        assert num_batches, "the stream ended before the run"


def _report(config: RunConfig, state: TrainState, monitor: Monitor | None, train_version: str) -> None:
    """Rank 0 scores and saves the EMA weights; every rank reports, which makes the checkpoint count."""
    if monitor is None:
        ray.train.report({"step": state.global_step})
        return
    metrics = monitor.evaluate(state) | {"step": state.global_step}
    meta = {"step": state.global_step, "metrics": metrics, "train_version": train_version}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        checkpoint.save(
            folder,
            model=state.ema_model.state_dict(),
            config=to_dict(config),
            meta=meta,
            train_state=state_tensors(state),
        )
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _steps_done(config: RunConfig) -> int:
    """Optimizer steps in the newest checkpoint of the run, which it continues from."""
    found = newest_checkpoint(config.run_uri)
    return _manifest(found)["meta"]["step"] if found else 0


def _refuse_changed_run(config: RunConfig, pictures: Pictures) -> None:
    found = newest_checkpoint(config.run_uri)
    if found is None:
        return
    manifest = _manifest(found)
    before, now = flatten(manifest["config"]), flatten(to_dict(config))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    fixed = ("train.global_batch_size",)  # where the stream of samples goes on is a multiple of it
    changed = [key for key in changed if key in fixed or not key.startswith(FREE_TO_CHANGE)]
    listed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:5]]
    version = manifest["meta"].get("train_version", pictures.version)  # a converted one has none
    if version != pictures.version:
        listed.append(f"the pictures of data.train_uri: version {version} -> {pictures.version}")
    if listed:
        raise ConfigError(
            f"run {config.name!r} has a checkpoint {found} of another config ({', '.join(listed)}). "
            "Restore the old values to continue it, or set another name to start a new run."
        )


def _manifest(checkpoint_uri: str) -> dict[str, Any]:
    file_system, path = open_uri(f"{checkpoint_uri}/{checkpoint.MANIFEST_FILE}")
    return json.loads(read_bytes(file_system, path))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("train", __doc__ or "", EXAMPLES)
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    inputs = check_inputs(config)
    with ray_cluster(), progress_line() as progress:
        outcome = train(config, inputs, progress)
    print(f"checkpoint: {outcome.checkpoint_uri}")
    print(f"next: python -m pipelines.evaluate --checkpoint {outcome.checkpoint_uri}")
    return 0


if __name__ == "__main__":
    run(main)
