"""The state that training changes, and its conversion to a checkpoint's tensors and back."""

import copy
import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..config import check
from ..model.checkpoint import CURRENT_WEIGHTS
from ..model.network import ConsistencyModel
from .transfer import plan_transfer


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation. Defaults are the published run's: AdamW, lr halved once, no warm-up."""

    ct_steps: int = 500_000
    """Optimizer updates of the first phase, consistency training; 0 for a run of the second phase alone."""
    dtm_steps: int = 2_000
    """Optimizer updates of the second phase, CT + DTM."""
    lr: float = 5e-5
    """Learning rate of AdamW."""
    lr_halve_at: int = 50_000
    """Global step from which the learning rate is halved."""
    betas: tuple[float, float] = (0.9, 0.9)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are evaluated and released."""
    dtm_refresh_steps: int = 1_000
    """Steps between renewals of the frozen copy that DTM compares with."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that keep their weights, such as model.enc.*; * stands for anything."""

    def __post_init__(self) -> None:
        check(self.ct_steps >= 0, f"optim.ct_steps must be at least 0, got {self.ct_steps}.")
        check(self.dtm_steps >= 0, f"optim.dtm_steps must be at least 0, got {self.dtm_steps}.")
        check(self.total_steps >= 1, "optim.ct_steps and optim.dtm_steps are both 0: nothing to train.")
        check(0 < self.lr <= 1, f"optim.lr must be in (0, 1], got {self.lr}.")
        check(self.lr_halve_at >= 1, f"optim.lr_halve_at must be at least 1, got {self.lr_halve_at}.")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1), got {self.betas}.")
        check(self.weight_decay >= 0, f"optim.weight_decay must be at least 0, got {self.weight_decay}.")
        check(0 <= self.ema_decay < 1, f"optim.ema_decay must be in [0, 1), got {self.ema_decay}.")
        check(
            self.dtm_refresh_steps >= 1,
            f"optim.dtm_refresh_steps must be at least 1, got {self.dtm_refresh_steps}.",
        )

    @property
    def total_steps(self) -> int:
        """Updates of both phases."""
        return self.ct_steps + self.dtm_steps


@dataclass(frozen=True)
class StepRecord:
    """What an error message about a step needs."""

    step: int
    samples: list[int]
    keys: list[str]
    losses: dict[str, Tensor]
    """Scalars on the device; reading one makes the host wait."""


@dataclass
class TrainState:
    """Everything that changes during training.

    `network`, which computes the losses and their gradients, is either `model` itself or a `bf16_copy` of it.
    In the latter case `model` holds the same weights in float32, for the optimizer and for checkpoints.
    """

    model: ConsistencyModel
    parallel: nn.Module
    """Computes the prediction: `network`, or the DistributedDataParallel around it."""
    optimizer: torch.optim.Optimizer
    ema_model: ConsistencyModel
    """The averaged weights as a model."""
    ema_decay: float
    num_averaged: int = 0
    """Updates in the average; the first one replaces it."""
    dtm_model: ConsistencyModel | None = None
    """The frozen copy g of the second phase."""
    global_step: int = 0
    """Optimizer updates done."""
    unchecked: list[StepRecord] = field(default_factory=list)
    """Steps whose gradients have not been checked to be finite yet."""

    def __post_init__(self) -> None:
        network = getattr(self.parallel, "module", self.parallel)
        assert isinstance(network, ConsistencyModel)
        self.network = network
        # Listed once: walking through the modules would cost milliseconds per step.
        self._weights, self._copies, self._averages = (
            cast(list[Tensor], list(model.parameters()))
            for model in (self.model, self.network, self.ema_model)
        )
        pairs = zip(self._weights, self._copies, strict=True)
        self._trained = [(weight, copied) for weight, copied in pairs if weight.requires_grad]

    @property
    def gradients(self) -> list[Tensor]:
        """Gradients of `model`'s weights, float32."""
        return [weight.grad for weight in self._weights if weight.grad is not None]

    def drop_gradients(self) -> None:
        """Clears all gradients; call it before the first backward pass of a step."""
        for weight in (*self._weights, *self._copies):
            weight.grad = None

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Moves the gradients of `network` to `model`, adding them in float32."""
        if self.network is self.model:
            return
        found = [copied.grad for _, copied in self._trained if copied.grad is not None]
        if self._trained[0][0].grad is None:
            for weight, _ in self._trained:
                weight.grad = torch.empty_like(weight)
            torch._foreach_copy_(self.gradients, found)
        else:
            torch._foreach_add_(self.gradients, [gradient.float() for gradient in found])
        for _, copied in self._trained:
            copied.grad = None

    @torch.no_grad()
    def update(self) -> None:
        """One AdamW step; then updates the average and, if there is one, the bf16 copy."""
        self.optimizer.step()
        if self.num_averaged:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.ema_decay)
        else:
            torch._foreach_copy_(self._averages, self._weights)
        self.num_averaged += 1
        self.refresh_network()
        self.global_step += 1

    @torch.no_grad()
    def refresh_network(self) -> None:
        """Copies the current weights of `model` to `network`."""
        if self.network is not self.model:
            torch._foreach_copy_(self._copies, self._weights)

    def refresh_dtm_model(self) -> None:
        """Sets `dtm_model` to a frozen copy of the current weights, without dropout."""
        self.dtm_model = copy.deepcopy(self.network).eval().requires_grad_(False)


def frozen_names(model: ConsistencyModel, patterns: Sequence[str]) -> set[str]:
    """The parameters that `optim.freeze` takes out of training.

    Args:
        model: Any model of the run's network.
        patterns: Of whole parameter names, with *, ? and [...] as in a shell.

    Raises:
        ConfigError: A pattern matches no parameter, or no parameter is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
        check(bool(matched), f"optim.freeze: {pattern!r} matches no parameter. The nearest is {near[0]}.")
        found.update(matched)
    check(
        len(found) < len(names),
        f"optim.freeze {list(patterns)} matches every parameter: nothing is left to train.",
    )
    return found


def freeze(model: ConsistencyModel, patterns: Sequence[str]) -> None:
    """Takes the matching parameters out of training. Call it before copies of the model and DDP are made."""
    for name in frozen_names(model, patterns):
        model.get_parameter(name).requires_grad_(False)


def build_state(model: ConsistencyModel, optim: OptimConfig, parallel: nn.Module | None = None) -> TrainState:
    """A TrainState at step 0.

    Args:
        model: The model to train, in float32.
        optim: Optimisation.
        parallel: Computes the prediction, if not `model`: a `bf16_copy` of it, or a DDP wrapper of either.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    return TrainState(model, parallel or model, optimizer, copy.deepcopy(model), optim.ema_decay)


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """All of `state` except the EMA weights, as flat tensors for `checkpoint.save`."""
    tensors = {f"{CURRENT_WEIGHTS}{name}": value for name, value in state.model.state_dict().items()}
    tensors["ema.n_averaged"] = torch.tensor(state.num_averaged)
    if state.dtm_model is not None:
        frozen = state.dtm_model.state_dict().items()
        tensors |= {f"dtm.{k}": v.float() if v.dtype == torch.bfloat16 else v for k, v in frozen}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    return tensors | {"global_step": torch.tensor(state.global_step)}


def start_from(state: TrainState, ema: ConsistencyModel, tensors: Mapping[str, Tensor]) -> None:
    """Starts from the weights, EMA and, if any, optimizer state of another run; steps count from 0.

    What `plan_transfer` finds of no use in the checkpoint stays as it was initialised. The optimizer state is
    taken only from a network that is the same. Frozen parameters get the EMA weights, the released ones, so
    that training sees the values that evaluation does.

    Args:
        state: Freshly built.
        ema: The checkpoint's model, of any network of the family.
        tensors: Its training state; empty for a released checkpoint, whose EMA weights are then trained.
    """
    plan = plan_transfer(ema, state.model)
    averages, fresh = ema.state_dict(), state.model.state_dict()
    averaged = plan.apply(averages, fresh)
    current = plan.apply(_section(tensors, CURRENT_WEIGHTS) or averages, fresh)
    frozen = {name for name, weight in state.model.named_parameters() if not weight.requires_grad}
    state.model.load_state_dict(current | {name: averaged[name] for name in frozen})
    state.ema_model.load_state_dict(averaged)
    state.num_averaged = 1  # at 0 the first update would replace the average
    state.refresh_network()
    if plan.is_whole:
        _restore_optimizer(state, tensors)


def restore_state(state: TrainState, ema: ConsistencyModel, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `state_tensors`, in place.

    Args:
        state: Freshly built, with the same network.
        ema: The checkpoint's model.
        tensors: From `state_tensors`.
    """
    state.model.load_state_dict(_section(tensors, CURRENT_WEIGHTS))
    state.ema_model.load_state_dict(ema.state_dict())
    state.num_averaged = int(tensors["ema.n_averaged"])
    state.refresh_network()
    if frozen := _section(tensors, "dtm."):
        state.refresh_dtm_model()
        assert state.dtm_model is not None
        state.dtm_model.load_state_dict(frozen)
    _restore_optimizer(state, tensors)
    state.global_step = int(tensors["global_step"])


def _restore_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _section(tensors, "optimizer.").items():
        index, moment = name.split(".")
        moments.setdefault(int(index), {})[moment] = value
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": moments})


def _section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
