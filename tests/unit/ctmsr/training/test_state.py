"""A run resumed from a checkpoint goes on as if it had never stopped, bit for bit."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ctmsr.config import to_dict
from ctmsr.errors import ConfigError
from ctmsr.model import checkpoint
from ctmsr.model.network import bf16_copy
from ctmsr.training.state import (
    OptimConfig,
    TrainState,
    build_state,
    freeze,
    restore_state,
    start_from,
    state_tensors,
)
from ctmsr.training.step import train_step
from tests.support.tiny import NETWORK, OPTIM, RECIPE, distance, filled_model, make_batch

# Updates 0 and 1 are CT, 2 to 5 are DTM with a new frozen copy at 2 and 4: a run at 3 needs that of 2.
DROPOUT = replace(NETWORK, dropout=0.1)
FROZEN = ("model.enc.*", "model.map_layer?.*")


def advance(state: TrainState, num_steps: int) -> list[dict[str, float]]:
    history = []
    for step in range(state.global_step, state.global_step + num_steps):
        losses = train_step(state, make_batch([2 * step, 2 * step + 1]), RECIPE, distance)
        history.append({name: value.item() for name, value in losses.items()})
    return history


def plain_state() -> TrainState:
    return build_state(filled_model(DROPOUT), OPTIM)


def copy_state() -> TrainState:
    """Of a run whose losses a bf16 copy computes."""
    model = filled_model(DROPOUT)
    return build_state(model, OPTIM, bf16_copy(model))


def frozen_state() -> TrainState:
    """Of a run that trains the decoder alone, computed by a bf16 copy."""
    model = filled_model(DROPOUT)
    freeze(model, FROZEN)
    return build_state(model, OPTIM, bf16_copy(model))


@pytest.mark.parametrize("fresh", [plain_state, copy_state, frozen_state])
def test_resuming_equals_not_pausing(tmp_path: Path, fresh: Callable[[], TrainState]) -> None:
    whole = fresh()
    history = advance(whole, 6)
    assert ["dtm_loss" in losses for losses in history] == [False, False, True, True, True, True]

    first = fresh()
    assert advance(first, 3) == history[:3]
    checkpoint.save(
        tmp_path / "c",
        model=first.ema_model.state_dict(),
        config={"network": to_dict(DROPOUT)},
        meta={},
        train_state=state_tensors(first),
    )
    second = fresh()
    restore_state(
        second, checkpoint.load_model(tmp_path / "c")[0], checkpoint.load_train_state(tmp_path / "c")
    )
    assert second.global_step == 3
    assert advance(second, 3) == history[3:]
    assert_equal(second, whole)


def test_a_checkpoint_is_the_same_whatever_computes() -> None:
    states = [plain_state(), copy_state()]
    kinds = []
    for state in states:
        advance(state, 3)
        kinds.append({name: (value.dtype, value.shape) for name, value in state_tensors(state).items()})
    assert kinds[0] == kinds[1]
    assert any(name.startswith("dtm.") for name in kinds[0])


def test_training_on_from_another_run_s_weights_refreshes_the_copy() -> None:
    before, state = plain_state(), copy_state()
    advance(before, 1)
    start_from(state, before.ema_model, state_tensors(before))
    for name, copied in state.network.named_parameters():
        assert torch.equal(copied, before.model.get_parameter(name).bfloat16())


@pytest.mark.parametrize("is_copy", [False, True])
def test_frozen_weights_stay_the_released_ones_and_the_others_move(is_copy: bool) -> None:
    before = plain_state()
    advance(before, 2)  # its weights are no longer their average
    model = filled_model(DROPOUT)
    freeze(model, FROZEN)
    optim = replace(OPTIM, weight_decay=0.1)
    state = build_state(model, optim, bf16_copy(model) if is_copy else None)
    start_from(state, before.ema_model, state_tensors(before))
    released = {name: value.clone() for name, value in before.ema_model.named_parameters()}
    advance(state, 2)
    moved = set()
    for name, weight in state.model.named_parameters():
        average = state.ema_model.get_parameter(name)
        if torch.equal(weight, released[name]) and torch.equal(average, released[name]):
            assert weight.grad is None
        else:
            moved.add(name)
            assert not torch.equal(average, released[name])
    assert moved == {name for name in released if not name.startswith(("model.enc.", "model.map_layer"))}


def test_gradients_of_several_parts_add_up_beside_frozen_weights() -> None:
    norms = []
    for size in (None, 1):
        model = filled_model()
        freeze(model, FROZEN)
        state = build_state(model, OPTIM, bf16_copy(model))
        losses = train_step(state, make_batch([0, 1]), RECIPE, distance, micro_batch_size=size)
        norms.append(losses["grad_norm"].item())
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("model.enc.*", "model.conv_lst.*"),
            "'model.conv_lst.*' matches no parameter. The nearest is model.conv_",
        ),
        (("enc.*",), "optim.freeze: 'enc.*' matches no parameter."),
        (("model.*",), "optim.freeze ['model.*'] matches every parameter: nothing is left to train."),
    ],
)
def test_patterns_that_freeze_nothing_or_everything(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        freeze(filled_model(), patterns)


def assert_equal(a: TrainState, b: TrainState) -> None:
    for found, expected in (
        (state_tensors(a), state_tensors(b)),
        (a.ema_model.state_dict(), b.ema_model.state_dict()),
    ):
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_first_phase_has_no_frozen_copy_to_keep() -> None:
    state = build_state(filled_model(), OPTIM)
    advance(state, 1)
    assert not any(name.startswith("dtm.") for name in state_tensors(state))
    other = build_state(filled_model(), OPTIM)
    restore_state(other, state.ema_model, state_tensors(state))
    assert other.dtm_model is None


def test_the_frozen_copy_stays_as_it_was_made() -> None:
    state = build_state(filled_model(DROPOUT), OPTIM)
    state.refresh_dtm_model()
    frozen = state.dtm_model
    assert frozen is not None
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    advance(state, 1)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert all(p.requires_grad for p in state.model.parameters())


def test_another_network_is_refused() -> None:
    tensors = state_tensors(build_state(filled_model(), OPTIM))
    other = replace(NETWORK, num_blocks=2)
    with pytest.raises(RuntimeError, match="Missing key"):
        restore_state(build_state(filled_model(other), OPTIM), filled_model(), tensors)


def test_total_steps_spans_both_phases() -> None:
    assert OptimConfig().total_steps == 502_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ct_steps": -1}, "optim.ct_steps must be at least 0, got -1."),
        ({"ct_steps": 0, "dtm_steps": 0}, "optim.ct_steps and optim.dtm_steps are both 0: nothing to train."),
        ({"dtm_steps": -1}, "optim.dtm_steps must be at least 0, got -1."),
        ({"lr": 0.0}, "optim.lr must be in (0, 1], got 0.0."),
        ({"lr_halve_at": 0}, "optim.lr_halve_at must be at least 1, got 0."),
        ({"betas": (0.9, 1.0)}, "optim.betas must be in [0, 1), got (0.9, 1.0)."),
        ({"weight_decay": -1.0}, "optim.weight_decay must be at least 0, got -1.0."),
        ({"ema_decay": 1.0}, "optim.ema_decay must be in [0, 1), got 1.0."),
        ({"dtm_refresh_steps": 0}, "optim.dtm_refresh_steps must be at least 1, got 0."),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        OptimConfig(**values)
