"""Training runs on one device, one after the other, with a network that is compiled only once.

A run follows a RunConfig: its weights, batches, losses and updates are those of the pipelines on one worker.
How many steps fit into a given time is measured. The cost of a step depends on its phase (an HR target saves
a call of the network, DTM needs two more), so each phase is timed before a run's `optim` is fixed.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from ctmsr.model.network import ConsistencyModel, NetworkConfig, bf16_copy
from ctmsr.rng import sample_seed
from ctmsr.training.state import TrainState, build_state, start_from, state_tensors
from ctmsr.training.step import check_finite, train_step
from pipelines.config.run_config import RunConfig

from .local_feed import LocalFeed

TRIAL_STEPS = 10_000
"""Length of the run whose phases are timed, so that its shares are whole steps."""


class LocalTrainer:
    """A network on a device, and what it costs to train it."""

    def __init__(
        self,
        network: NetworkConfig,
        lpips: nn.Module,
        device: torch.device,
        *,
        bf16: bool,
        compiled: bool,
        by_cpu_time: bool = False,
    ) -> None:
        """Puts both networks on the device.

        Args:
            network: The network to train.
            lpips: The network of its loss.
            device: Device to train on.
            bf16: Whether losses are computed on a bf16 copy of the weights.
            compiled: Whether both are compiled, in a first slow step.
            by_cpu_time: Whether `clock` measures this process's CPU time, for CPUs shared with others.
        """
        self.lpips, self.device, self._by_cpu_time = lpips.to(device), device, by_cpu_time
        self.model = ConsistencyModel(network).to(device)
        if device.type == "cuda":
            for module in (self.model, self.lpips):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._working = bf16_copy(self.model) if bf16 else self.model
        self.is_compiled = compiled
        if compiled:
            for module in (self._working.model, self.lpips):
                module.compile(dynamic=False)

    def start(self, config: RunConfig, before: TrainState | None = None) -> TrainState:
        """A state at step 0: from the seed's weights, or another run's end, optimizer and EMA included."""
        if before is None:
            torch.manual_seed(sample_seed(config.seed, "weights"))
            self.model.load_state_dict(ConsistencyModel(config.network).state_dict())
            state = build_state(self.model, config.optim, self._working)
        else:
            tensors = {name: value.clone() for name, value in state_tensors(before).items()}
            state = build_state(self.model, config.optim, self._working)
            start_from(state, before.ema_model, tensors)
        state.refresh_network()
        return state

    def warm_up(self, config: RunConfig, feed: LocalFeed) -> str:
        """Compiles the networks; if that fails, continues uncompiled and returns the reason."""
        try:
            self._time_steps(config, feed, first=0, num=2)
        except RuntimeError as error:  # includes torch's and Triton's own errors
            if not self.is_compiled:
                raise
            self.is_compiled = False
            for module in (self._working.model, self.lpips):
                module._compiled_call_impl = None
            self._time_steps(config, feed, first=0, num=2)
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def seconds_a_step(
        self, config: RunConfig, feed: LocalFeed, *, dtm_share: float = 0.0, trials: int = 12
    ) -> float:
        """Mean seconds per step of a run, from `trials` steps of each of its phases."""
        trial = with_steps(config, TRIAL_STEPS, dtm_share)
        hr_steps = round(trial.loss.hr_target_until * TRIAL_STEPS)
        borders = sorted({0, min(hr_steps, trial.optim.ct_steps), trial.optim.ct_steps, TRIAL_STEPS})
        return sum(
            (last - first) / TRIAL_STEPS * self._time_steps(trial, feed, first=first, num=trials)
            for first, last in pairwise(borders)
        )

    def run(
        self,
        config: RunConfig,
        feed: LocalFeed,
        *,
        before: TrainState | None = None,
        goes_on: Callable[[TrainState, dict[str, torch.Tensor]], bool] = lambda state, losses: True,
    ) -> TrainState:
        """Trains to the last step, or until `goes_on`, which gets every step's losses, returns false."""
        state = self.start(config, before)
        recipe = config.recipe
        while state.global_step < config.optim.total_steps:
            losses = train_step(state, feed.batch(state.global_step), recipe, self.lpips)
            if not goes_on(state, losses):
                break
        check_finite(state)
        return state

    def clock(self) -> float:
        """Seconds, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self._by_cpu_time else time.perf_counter()

    def _time_steps(self, config: RunConfig, feed: LocalFeed, *, first: int, num: int) -> float:
        """Mean seconds of steps from `first` on, after two uncounted ones; the state is discarded."""
        state = self.start(config)
        state.global_step = first
        if config.optim.dtm_steps and first >= config.optim.ct_steps:
            state.refresh_dtm_model()
        started = 0.0
        for number in range(num + 2):
            if number == 2:
                started = self.clock()
            train_step(state, feed.batch(state.global_step), config.recipe, self.lpips)
        return (self.clock() - started) / num


def with_steps(config: RunConfig, total: int, dtm_share: float = 0.0) -> RunConfig:
    """The config with `total` steps, lr halved at 0.6 of them and an EMA over a thirtieth."""
    dtm_steps = round(dtm_share * total)
    optim = replace(
        config.optim,
        ct_steps=total - dtm_steps,
        dtm_steps=dtm_steps,
        lr_halve_at=max(1, round(0.6 * total)),
        ema_decay=min(0.9999, max(0.5, round(1 - 30 / total, 5))),
        dtm_refresh_steps=max(1, dtm_steps // 4),
    )
    return replace(config, optim=optim)
