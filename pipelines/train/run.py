"""A training run: the checks before it starts, the trainer, and the run in MLflow."""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from ctmsr.config import check, to_dict
from ctmsr.errors import ConfigError
from ctmsr.metrics.perceptual import load_lpips

from ..config.identity import RUN
from ..config.run_config import RunConfig
from ..data.pictures import Pictures, about_setting, find_pictures
from ..data.stream import StreamConfig, StreamFactory, check_images, train_stream
from ..infra.checkpoints import Stored, find, newest
from ..infra.cluster import check_gpus
from ..infra.progress import counted
from ..infra.storage import check_outlives_job, delete_folder, open_uri, write_bytes
from ..tracking.evaluations import PictureSet, log_sets
from ..tracking.runs import ensure_experiment, find_run, preflight, tracked_run
from .leader import LIBRARIES
from .retries import fit, steps_done
from .start import starting_point
from .validation import RANKED_BY, score_the_rest, validation
from .worker import train_loop_per_worker

_RESIZE_EVERY_S = 30
"""How often an elastic run looks for new nodes."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, found and checked before anything expensive starts."""

    train: Pictures
    val: Pictures
    tracking_uri: str
    start: str = ""
    """What `init_uri` gives the network, for people; empty without one."""

    def __str__(self) -> str:
        others = self.train.num_others + self.val.num_others
        left_out = f"; left out: {counted(others, 'other file')}" if others else ""
        found = f"{counted(len(self.train), 'picture')} to train on, {len(self.val)} held out{left_out}"
        return f"{found}\n{self.start}" if self.start else found


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    checkpoint_uri: str
    metrics: dict[str, float]
    """Of the EMA weights on data.val_uri."""
    run_id: str
    """In MLflow."""


def check_inputs(config: RunConfig, *, fresh: bool = False) -> Inputs:
    """Checks everything that a run needs, within seconds and without Ray.

    Finally writes the resolved config to the run's folder, which shows whether that is writable. With
    `fresh`, an existing run there may have another config.

    Raises:
        UserError: Pictures, storage, backbones or MLflow cannot be used, or the run has another config.
    """
    check_gpus(config.train.num_workers, use_gpu=config.train.use_gpu)
    check_outlives_job("storage_uri", config.storage_uri)
    with about_setting("data.train_uri"):
        pictures = find_pictures(config.data.train_uri)
    with about_setting("data.val_uri"):
        val = find_pictures(config.data.val_uri)
    check(
        config.data.order == "global" or pictures.has_shards,
        f"data.order=sharded reads neighbours in shards, and {pictures.uri} has pictures outside of shards. "
        "Pack them with `python -m pipelines.index FOLDER --pack TARS`, then set data.train_uri=TARS.index; "
        "or set data.order=global.",
    )
    check_images(pictures, hr_crop_size=config.network.hr_size)
    check_images(val, hr_crop_size=config.data.eval_crop_size)
    for place in (pictures, val):
        check(
            place.scale in (None, config.network.scale),
            f"the LR pictures of {place.uri} are {place.scale} times smaller, but network.scale is "
            f"{config.network.scale}. Set it to {place.scale}, or use other pictures.",
        )
    for net in ("vgg", "alex"):
        load_lpips(net)
    start = starting_point(config) if config.init_uri else ""
    if not fresh:
        _refuse_changed_run(config, pictures)
    tracking_uri = preflight(config.tracking_uri)
    _write_config(config)
    return Inputs(pictures, val, tracking_uri, start)


def train(
    config: RunConfig,
    inputs: Inputs,
    progress: Queue,
    parent_run_id: str | None = None,
    *,
    fresh: bool = False,
) -> Outcome:
    """Runs the training to its end, starting from its newest checkpoint if there is one.

    Args:
        config: The run.
        inputs: From `check_inputs`.
        progress: From `progress_line`.
        parent_run_id: MLflow run of the search that this run is a trial of.
        fresh: Whether to delete an earlier run of this name and start over.

    Raises:
        UserError: The training failed; the message is the cause.
    """
    if fresh:
        start_over(config)
    with training_run(config, inputs, parent_run_id, is_new=fresh) as run_id:
        last = train_to_the_end(config, inputs, progress, run_id)
    return Outcome(last.uri, last.meta["metrics"], run_id)


def train_to_the_end(
    config: RunConfig, inputs: Inputs, progress: Queue, run_id: str, *, is_trial: bool = False
) -> Stored:
    """Trains whatever steps are missing; returns the last checkpoint, with its scores.

    Raises:
        UserError: The training failed, or the checkpoint cannot be scored; the message is the cause.
    """
    if (done := steps_done(config)) < config.optim.total_steps:
        if not is_trial:
            since = f", from step {done}" if done else ""
            progress.put_nowait(
                f"{config.name}: starting {counted(config.train.num_workers, 'worker')}{since}"
            )
        fit(config, lambda: build_trainer(config, inputs, progress, run_id), progress, is_trial=is_trial)
    score_the_rest(_loop(config, inputs, progress, run_id), inputs.val)
    return find(config.run_uri)


def start_over(config: RunConfig) -> None:
    """Deletes the run's folder, checkpoints included, and writes its config again."""
    delete_folder(config.run_uri)
    _write_config(config)


@contextmanager
def training_run(
    config: RunConfig,
    inputs: Inputs,
    parent_run_id: str | None = None,
    *,
    is_new: bool = False,
    shown: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """The training's MLflow run for the duration of a `with` block; resumes its earlier one, if any.

    `shown` are its params in MLflow, if they are not to be the whole config.
    """
    experiment_id = ensure_experiment(inputs.tracking_uri, config.experiment)
    storage = config.run_uri if "://" in config.run_uri else open_uri(config.run_uri)[1]
    tags = {
        "storage": storage,
        "train_pictures": str(len(inputs.train)),
        "train_version": inputs.train.version,
        "val_version": inputs.val.version,
        **{f"version.{name}": importlib.metadata.version(name) for name in LIBRARIES},
    }
    # --fresh keeps the MLflow runs of an earlier search, whose trials had the same folders.
    mark = {"storage": storage} | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
    known = None if is_new else find_run(inputs.tracking_uri, experiment_id, mark)
    with tracked_run(
        inputs.tracking_uri,
        experiment_id,
        config.name,
        params=to_dict(config),
        shown=shown,
        tags=tags,
        parent_run_id=parent_run_id,
        run_id=known,
    ) as run_id:
        if known is None:
            log_sets(
                inputs.tracking_uri,
                run_id,
                [
                    PictureSet(inputs.train.uri, inputs.train.version, "training"),
                    PictureSet(inputs.val.uri, inputs.val.version, "validation"),
                ],
            )
        yield run_id


def build_trainer(
    config: RunConfig, inputs: Inputs, progress: Queue, run_id: str, callbacks: Sequence[Any] = ()
) -> TorchTrainer:
    """The only trainer of the project; Tune trials use it too."""
    file_system, storage_path = open_uri(config.storage_uri)
    size = config.train.global_batch_size

    def train_samples() -> StreamFactory:  # called whenever a worker group starts
        return partial(
            train_stream,
            inputs.train,
            hr_crop_size=config.network.hr_size,
            scale=config.network.scale,
            degradation=config.degradation,
            seed=config.seed,
            skip=steps_done(config) * size,
            total=config.optim.total_steps * size,
            global_batch_size=size,
            flips=config.data.random_flip,
            order_version=config.data.order_version,
            crops_per_picture=config.data.crops_per_picture,
            order=config.data.order,
        )

    datasets: dict[str, Any] = {"train": train_samples}
    loop = _loop(config, inputs, progress, run_id)
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config=loop,
        validation_config=validation(loop, inputs.val),  # type: ignore[call-arg]  # mypy sees Ray's older class
        scaling_config=_scaling(config),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=storage_path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=0),  # see `fit`
            checkpoint_config=CheckpointConfig(config.train.num_checkpoints_kept, RANKED_BY, "max"),
            callbacks=list(callbacks),
        ),
        datasets=datasets,
        dataset_config=StreamConfig(),
    )


def _loop(config: RunConfig, inputs: Inputs, progress: Queue, run_id: str) -> dict[str, Any]:
    """What workers and scoring tasks need besides the pictures."""
    return {
        "config": to_dict(config),
        "tracking_uri": inputs.tracking_uri,
        "run_id": run_id,
        "progress": progress,
        "num_pictures": len(inputs.train),
        "train_version": inputs.train.version,
    }


def _scaling(config: RunConfig) -> ScalingConfig:
    train = config.train
    arguments: dict[str, Any] = {  # mypy sees Ray's older class, without elastic training
        "num_workers": (train.min_workers, train.num_workers) if train.min_workers else train.num_workers,
        "elastic_resize_monitor_interval_s": _RESIZE_EVERY_S,
    }
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if train.use_gpu else {})
    return ScalingConfig(use_gpu=train.use_gpu, resources_per_worker=resources, **arguments)


def _refuse_changed_run(config: RunConfig, pictures: Pictures) -> None:
    found = newest(config.run_uri)
    if found is None:
        return
    listed = RUN.changes(found.config, to_dict(config))
    version = found.meta.get("train_version", pictures.version)  # a converted checkpoint has none
    if version != pictures.version:
        listed.append(f"the pictures of data.train_uri: version {version} -> {pictures.version}")
    if listed:
        raise ConfigError(
            f"run {config.name!r} has a checkpoint {found.uri} of another config ({', '.join(listed)}). "
            "Restore the old values to resume it, set another name to start a new run, or use --fresh to "
            "delete this one and start over."
        )


def _write_config(config: RunConfig) -> None:
    write_bytes(f"{config.run_uri}/config.json", (json.dumps(to_dict(config), indent=2) + "\n").encode())
