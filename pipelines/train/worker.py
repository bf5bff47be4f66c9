"""The training loop that every Ray Train worker runs; rank 0 also reports and saves checkpoints.

All random numbers of a run are functions of its seed and the global step or sample, and the samples of all
steps so far are a prefix of one fixed order. So weights, optimizer state and step number are the whole state
of a run, and after a restart, on any number of workers, the next step sees the images it would have seen.
"""

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed

from ctmsr.config import from_dict
from ctmsr.metrics.perceptual import Lpips, load_lpips
from ctmsr.model import checkpoint
from ctmsr.model.device import prefetch, use_fast_math
from ctmsr.model.network import ConsistencyModel, bf16_copy
from ctmsr.rng import sample_seed
from ctmsr.training.state import TrainState, build_state, freeze, restore_state, start_from
from ctmsr.training.step import Batch, check_finite, compile_step, train_step

from ..config.run_config import RunConfig
from ..data.batches import StreamMonitor, make_batch
from ..data.read_ahead import read_ahead
from ..data.sample_order import rows_per_worker
from ..data.stream import Rows
from ..infra.checkpoints import fetched, newest

_ROWS_AHEAD = 640
"""Rows that wait in a worker: the stream comes in rounds of 5 000 or so, whose first rows take long."""


def train_loop_per_worker(loop: Mapping[str, Any]) -> None:
    """Trains from the newest checkpoint to the last step.

    Args:
        loop: "config" (RunConfig as a dict), "tracking_uri", "run_id", "progress" (queue), "num_pictures" and
            "train_version".
    """
    config = from_dict(RunConfig, loop["config"])
    context = ray.train.get_context()
    num_workers = context.get_world_size()
    device = ray.train.torch.get_device()
    use_fast_math()
    state, unsent = _initial_state(config, device)
    lpips = _loss_network(config, device)
    if config.train.compile:
        compile_step(state)
    monitor = StreamMonitor(config.data.max_unreadable, loop["num_pictures"] / num_workers, loop["progress"])
    leader = None
    if context.get_world_rank() == 0:
        from .leader import Leader  # with MLflow, whose second the other ranks and Ray's controller save

        leader = Leader(config, loop, monitor, unsent)
    num_steps = config.optim.total_steps - state.global_step
    batches = prefetch(_batches(config, num_workers, num_steps, monitor), device)
    notice = None
    while state.global_step < config.optim.total_steps:
        started = time.monotonic()
        batch = next(batches)
        waited_s = time.monotonic() - started
        _check_position(batch, state, config)
        losses = train_step(state, batch, config.recipe, lpips, config.train.micro_batch_size)
        if leader:
            leader.reporter.count(waited_s)
        done, is_preempted = state.global_step == config.optim.total_steps, False
        if done or state.global_step % config.train.log_every_steps == 0:
            means = _mean_over_workers(losses, batch.share)
            if leader:
                leader.report(state, means)
            before, notice = notice, ray.train.get_preemption_info()
            is_preempted = notice is not None and notice != before
        if done or is_preempted or state.global_step % config.train.checkpoint_every_steps == 0:
            check_finite(state)
            if leader:
                with leader.reporter.between_steps():
                    leader.save(state, is_last_chance=is_preempted and not done)
            else:
                ray.train.report({"step": state.global_step})  # a barrier: once on every worker
    if leader:
        leader.close()


def _loss_network(config: RunConfig, device: torch.device) -> Lpips:
    lpips = load_lpips("vgg", config.train.precision).to(device)
    if config.train.use_gpu:
        lpips.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lpips


def _initial_state(config: RunConfig, device: torch.device) -> tuple[TrainState, list[dict[str, Any]]]:
    """The state of the newest checkpoint, else the initial one; and metrics that had not reached MLflow."""
    torch.manual_seed(sample_seed(config.seed, "weights"))
    model = ConsistencyModel(config.network).to(device)
    model.model.recompute = config.train.activation_checkpointing
    freeze(model, config.optim.freeze)
    if config.train.use_gpu:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    working = bf16_copy(model) if config.train.precision == "bf16" else model
    ddp = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    parallel = ray.train.torch.prepare_model(working, parallel_strategy_kwargs=ddp)
    state, unsent = build_state(model, config.optim, parallel), []
    if found := newest(config.run_uri):
        with fetched(found.uri) as folder:
            ema, _ = checkpoint.load_model(folder)
            restore_state(state, ema, checkpoint.load_train_state(folder))
        unsent = found.meta.get("unsent_metrics", [])
    elif config.init_uri:
        with fetched(config.init_uri) as folder:
            ema, manifest = checkpoint.load_model(folder)
            has_state = checkpoint.TRAIN_STATE_FILE in manifest.files
            start_from(state, ema, checkpoint.load_train_state(folder) if has_state else {})
    return state, unsent


def _batches(config: RunConfig, num_workers: int, num_steps: int, monitor: StreamMonitor) -> Iterator[Batch]:
    """This worker's part of the batches of so many steps."""
    size = config.train.global_batch_size
    num_rows = rows_per_worker(size, num_workers)
    coming = islice(_rows(ray.train.get_dataset_shard("train"), num_rows), num_steps)
    for rows in read_ahead(coming, -(-_ROWS_AHEAD // num_rows)):
        monitor.count(rows)
        yield make_batch(rows, global_batch_size=size, num_workers=num_workers)


def _rows(shard: ray.data.DataIterator, num_rows: int) -> Iterator[Rows]:
    """This worker's rows of every step, endlessly: each iteration over the shard yields a bounded number."""
    while True:
        num_batches = 0
        for rows in shard.iter_batches(batch_size=num_rows, batch_format="numpy", drop_last=True):
            num_batches += 1
            yield rows
        assert num_batches, "the stream ended before the run"


def _check_position(batch: Batch, state: TrainState, config: RunConfig) -> None:
    """Checks that data and weights are at the same step: a checkpoint may have arrived in between.

    Raises:
        RuntimeError: They are not; restarting the workers fixes it.
    """
    step = batch.samples[0] // config.train.global_batch_size
    if batch.share and step != state.global_step:
        raise RuntimeError(
            f"the data are those of step {step}, but the weights are of step {state.global_step}."
        )


def _mean_over_workers(losses: Mapping[str, torch.Tensor], share: float) -> dict[str, float]:
    """Means over the images of the global batch; the gradient norm is the same on all workers."""
    names = [name for name in losses if name != "grad_norm"]
    sums = torch.stack(
        [share * losses[name].double() for name in names] + [torch.tensor(share).to(losses[names[0]])]
    )
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    *totals, shares = sums.tolist()
    means = {name: total / max(shares, 1e-12) for name, total in zip(names, totals, strict=True)}
    return means | {"grad_norm": losses["grad_norm"].item()}
