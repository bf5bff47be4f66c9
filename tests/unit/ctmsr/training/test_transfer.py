"""What a network takes from another of its family, and that it computes what the other did."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctmsr.model.network import ConsistencyModel, NetworkConfig, described
from ctmsr.training.objective import Batch, Recipe
from ctmsr.training.state import OptimConfig, build_state, start_from, state_tensors
from ctmsr.training.step import train_step
from ctmsr.training.transfer import Transfer, plan_transfer
from tests.support.fixture_inputs import tensor
from tests.support.tiny import NETWORK, OPTIM, RECIPE, distance, filled_model, make_batch


def plan_to(**changes: Any) -> Transfer:
    return plan_transfer(described(NETWORK), described(replace(NETWORK, **changes)))


def taken(before: ConsistencyModel, config: NetworkConfig) -> ConsistencyModel:
    """A network of `config` with what it can take."""
    now = ConsistencyModel(config)
    now.load_state_dict(plan_transfer(before, now).apply(before.state_dict(), now.state_dict()))
    return now.eval()


def test_the_same_network_is_taken_as_a_whole() -> None:
    plan = plan_to(dropout=0.5)
    assert plan.is_whole
    assert plan.share == 1
    assert all(name == source for name, source in plan.loaded.items())


def test_another_crop_size_renames_levels_and_changes_nothing() -> None:
    config = replace(NETWORK, lq_size=24)
    plan = plan_transfer(described(NETWORK), described(config))
    assert plan.is_whole
    assert plan.loaded["model.dec.12x12_in0.conv0.weight"] == "model.dec.4x4_in0.conv0.weight"
    before = filled_model().eval()
    inputs = tensor("x", (1, 3, 64, 64)), torch.tensor(0.7), tensor("lq", (1, 3, 16, 16))
    with torch.no_grad():
        assert torch.equal(taken(before, config)(*inputs), before(*inputs))


@pytest.mark.parametrize("scale", [2, 3])
def test_another_scale_keeps_all_but_what_it_has_no_use_for(scale: int) -> None:
    plan = plan_to(scale=scale)
    assert list(plan.resampled) == ["model.enc.8x8_conv.weight"]
    assert plan.anew == []
    assert plan.left == ["model.conv_up2.weight", "model.conv_up2.bias"]
    assert plan.share == 1


def test_a_larger_scale_begins_its_second_enlargement_anew() -> None:
    plan = plan_transfer(described(replace(NETWORK, scale=2)), described(NETWORK))
    assert plan.anew == ["model.conv_up2.weight", "model.conv_up2.bias"]
    assert plan.left == []
    assert 0.9 < plan.share < 1


def first_layer(model: ConsistencyModel, x: Tensor, lq: Tensor) -> Tensor:
    layer = model.model.enc["8x8_conv"]
    return layer(torch.cat([F.pixel_unshuffle(x, model.config.scale), lq], dim=1))


def test_the_first_layer_answers_a_smaller_scale_as_it_did_the_repeated_pixels() -> None:
    before = filled_model()
    now = taken(before, replace(NETWORK, scale=2))
    x, lq = tensor("x", (1, 3, 16, 16)), tensor("lq", (1, 3, 8, 8))
    repeated = F.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(
        first_layer(now, x, lq), first_layer(before, repeated, lq), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "is_anew"),
    [
        ({"num_heads": 1}, "relative_position_bias_table"),
        ({"window_size": 2}, "relative_position_bias_table"),
        ({"num_blocks": 2}, "block"),
        ({"embed_dim": 64}, "swin_layer"),
    ],
)
def test_what_differs_in_shape_begins_anew(changes: dict[str, Any], is_anew: str) -> None:
    plan = plan_to(**changes)
    assert plan.anew
    assert all(is_anew in name for name in plan.anew)
    assert 0.4 < plan.share < 1
    now = taken(filled_model(), replace(NETWORK, **changes))
    sr = now(tensor("x", (1, 3, 32, 32)), torch.tensor(0.7), tensor("lq", (1, 3, 8, 8)))
    assert torch.isfinite(sr).all()


def test_another_width_has_little_in_common() -> None:
    assert plan_to(model_channels=48).share < 0.5


def test_a_run_at_another_scale_starts_from_the_average_and_the_weights() -> None:
    before = build_state(filled_model(), OPTIM)
    train_step(before, make_batch([0, 1]), RECIPE, distance)
    train_step(before, make_batch([2, 3]), RECIPE, distance)
    state = build_state(ConsistencyModel(replace(NETWORK, scale=2)), OPTIM)
    fresh = state.model.state_dict()["model.conv_last.weight"].clone()
    start_from(state, before.ema_model, state_tensors(before))
    for now, then in ((state.model, before.model), (state.ema_model, before.ema_model)):
        assert torch.equal(now.model.conv_last.weight, then.model.conv_last.weight)
    assert not torch.equal(state.model.model.conv_last.weight, fresh)
    assert state.optimizer.state_dict()["state"] == {}
    batch = make_batch([4, 5])
    halved = Batch(
        F.avg_pool2d(batch.hr_u8.float().permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).byte(),
        *(batch.lq_u8, batch.samples, batch.keys),
    )
    recipe = Recipe(seed=0, optim=OptimConfig(ct_steps=9), schedule=RECIPE.schedule, loss=RECIPE.loss)
    losses = train_step(state, halved, recipe, distance)
    assert torch.isfinite(losses["loss"])
