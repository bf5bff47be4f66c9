"""One update: what it learns, what moves, what its random numbers depend on, and when it refuses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctmsr.model.network import bf16_copy
from ctmsr.model.noise import NoiseVersion
from ctmsr.model.schedule import ScheduleConfig
from ctmsr.training.objective import Batch, compute_losses, sample_noise
from ctmsr.training.state import StepRecord, TrainState, build_state, state_tensors
from ctmsr.training.step import check_finite, compile_step, train_step
from tests.support.tiny import NETWORK, OPTIM, RECIPE, distance, filled_model, flat, make_batch

BATCH = make_batch([10, 11, 12, 13])


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(
        hr_u8=batch.hr_u8[rows],
        lq_u8=batch.lq_u8[rows],
        samples=batch.samples[rows],
        keys=batch.keys[rows],
    )


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def test_the_loss_falls_on_one_repeated_batch() -> None:
    # N = 1: the target is the HR image itself, so the loss cannot fall by the target's coming nearer.
    optim = replace(OPTIM, ct_steps=100, lr=2e-3)
    recipe = replace(RECIPE, optim=optim, schedule=ScheduleConfig(s0=1, s1=1))
    state, batch = build_state(filled_model(), optim), part(BATCH, slice(2))
    losses = [train_step(state, batch, recipe, distance)["ct_loss"].item() for _ in range(15)]
    assert losses[-1] < 0.6 * losses[0]


def test_samples_that_could_not_be_read_add_no_gradient() -> None:
    whole, half, none = (
        train_step(build_state(filled_model(), OPTIM), replace(BATCH, share=share), RECIPE, distance)
        for share in (1.0, 0.5, 0.0)
    )
    assert half["grad_norm"] == whole["grad_norm"] / 2
    assert half["loss"] == whole["loss"]
    assert none["grad_norm"] == 0


@pytest.mark.parametrize("phase", [1, 2])
def test_parts_of_a_batch_add_up_to_the_whole(phase: int) -> None:
    found = []
    for size in (None, 3, 1):
        state = build_state(filled_model(), OPTIM)
        if phase == 2:
            state.refresh_dtm_model()
        losses = train_step(state, BATCH, RECIPE, distance, size)
        found.append((losses, flat([p.grad for p in state.model.parameters() if p.grad is not None])))
    (whole, gradient), *others = found
    for losses, other in others:
        assert losses.keys() == whole.keys()
        for name, value in whole.items():
            assert losses[name].item() == pytest.approx(
                value.item(), rel=2e-3 if name == "grad_norm" else 1e-5
            )
        assert np.linalg.norm(other - gradient) < 5e-3 * np.linalg.norm(gradient)


def test_every_parameter_moves_and_the_average_follows_in_closed_form() -> None:
    optim = replace(OPTIM, ema_decay=0.75)
    state = build_state(filled_model(), optim)
    start, visited = weights(state), []
    for _ in range(4):
        train_step(state, part(BATCH, slice(2)), replace(RECIPE, optim=optim), distance)
        visited.append(weights(state))
    assert state.global_step == 4
    assert [name for name in start if torch.equal(start[name], visited[0][name])] == []
    for name, averaged in state.ema_model.named_parameters():
        p_1, p_2, p_3, p_4 = (each[name] for each in visited)
        expected = 0.75**3 * p_1 + 0.25 * (0.75**2 * p_2 + 0.75 * p_3 + p_4)
        torch.testing.assert_close(averaged.detach(), expected)


def test_the_learning_rate_is_halved_once() -> None:
    recipe = replace(RECIPE, optim=replace(OPTIM, lr=1e-3, lr_halve_at=1))
    state, rates = build_state(filled_model(), recipe.optim), []
    for _ in range(3):
        train_step(state, part(BATCH, slice(1)), recipe, distance)
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == [1e-3, 5e-4, 5e-4]


def test_the_second_phase_adds_dtm_and_renews_its_copy() -> None:
    state, copies = build_state(filled_model(), OPTIM), []
    for step in range(OPTIM.total_steps):
        before = weights(state)
        losses = train_step(state, part(BATCH, slice(2)), RECIPE, distance)
        assert [name for name, p in weights(state).items() if torch.equal(before[name], p)] == []
        assert ("dtm_loss" in losses) == (step >= 2)
        if step >= 2:
            assert losses["dtm_loss"] > 0
            torch.testing.assert_close(losses["loss"], losses["ct_loss"] + losses["dtm_loss"])
        copies.append(state.dtm_model)
        if step in (2, 4):
            assert state.dtm_model is not None
            assert all(torch.equal(p, before[name]) for name, p in state.dtm_model.named_parameters())
    assert copies[:2] == [None, None]
    assert copies[2] is copies[3]
    assert copies[4] is copies[5]
    assert copies[3] is not copies[4]


def test_dtm_changes_the_gradient() -> None:
    state = build_state(filled_model(), OPTIM)
    ct = train_step(state, part(BATCH, slice(2)), RECIPE, distance)["grad_norm"]
    other = build_state(filled_model(), OPTIM)
    other.refresh_dtm_model()
    both = train_step(other, part(BATCH, slice(2)), RECIPE, distance)["grad_norm"]
    assert abs(both / ct - 1) > 1e-3


@pytest.mark.parametrize("phase", [1, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_update(phase: int) -> None:
    def broken(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b) / 0

    state = build_state(filled_model(), OPTIM)
    for _ in range(phase):
        train_step(state, part(BATCH, slice(2)), RECIPE, distance)
    before = {name: value.clone() for name, value in state_tensors(state).items()}
    average = {name: value.clone() for name, value in state.ema_model.state_dict().items()}
    named = r"samples \[10, 11\], images \['picture10\.png', 'picture11\.png'\]"
    message = rf"gradient of step {phase} is not finite .*to blame: lpips, ct_loss.*{named}"
    with pytest.raises(FloatingPointError, match=message):
        train_step(state, part(BATCH, slice(2)), RECIPE, broken)
    after = state_tensors(state)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(torch.equal(value, average[name]) for name, value in state.ema_model.state_dict().items())


def test_a_late_check_names_the_step_whose_gradient_was_not_finite_and_keeps_its_weights() -> None:
    def broken(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b) / 0

    state = build_state(filled_model(), OPTIM)
    state.check_every = 3  # as on a GPU, where it is 16
    train_step(state, part(BATCH, slice(2)), RECIPE, distance)
    before = weights(state)
    train_step(state, part(BATCH, slice(2)), RECIPE, broken)
    with pytest.raises(FloatingPointError, match=r"gradient of step 1 is not finite"):
        train_step(state, part(BATCH, slice(2)), RECIPE, distance)
    assert all(torch.equal(before[name], value) for name, value in weights(state).items())


def test_steps_that_were_not_checked_at_once_are_told_apart_later() -> None:
    state = build_state(filled_model(), OPTIM)
    for step, norm in enumerate((1.0, float("nan"), float("inf"))):
        losses = {"lpips": torch.tensor(0.5), "grad_norm": torch.tensor(norm)}
        state.unchecked.append(StepRecord(step, [step], [f"{step}.png"], losses))
    named = r"the losses of this worker are finite; samples \[1\], images \['1\.png'\]"
    with pytest.raises(FloatingPointError, match=rf"gradient of step 1 is not finite .*{named}"):
        check_finite(state)
    check_finite(state)  # what was told is told once


def test_fused_adamw_leaves_the_weights_alone_where_it_is_told_so() -> None:
    state = build_state(filled_model(), OPTIM)
    train_step(state, part(BATCH, slice(1)), RECIPE, distance)
    before = weights(state)
    state.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    train_step(state, part(BATCH, slice(1)), RECIPE, distance)
    assert all(torch.equal(before[name], value) for name, value in weights(state).items())


def gradients(*, recompute: bool = False) -> tuple[float, Tensor]:
    """Loss, and all gradients in a row, of one batch under dropout."""
    state = build_state(filled_model(replace(NETWORK, dropout=0.3)), OPTIM)
    state.model.train()
    state.model.model.recompute = recompute
    loss = compute_losses(state, part(BATCH, slice(2)), RECIPE, distance)["loss"]
    loss.backward()
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]
    return loss.item(), torch.from_numpy(flat(grads))


def test_recomputed_activations_change_nothing() -> None:
    loss, gradient = gradients()
    again, recomputed = gradients(recompute=True)
    assert again == loss
    assert torch.equal(recomputed, gradient)


def copy_state(**changes: Any) -> TrainState:
    """Of a run whose losses a bf16 copy computes."""
    model = filled_model(replace(NETWORK, **changes))
    return build_state(model, OPTIM, bf16_copy(model))


@pytest.mark.parametrize("phase", [1, 2])
def test_a_bf16_copy_computes_the_gradients_of_float32_weights(phase: int) -> None:
    exact, state = build_state(filled_model(replace(NETWORK, dropout=0.3)), OPTIM), copy_state(dropout=0.3)
    for each in (exact, state):
        if phase == 2:
            each.refresh_dtm_model()
    expected = train_step(exact, part(BATCH, slice(2)), RECIPE, distance)
    losses = train_step(state, part(BATCH, slice(2)), RECIPE, distance)
    assert losses["loss"] != expected["loss"]
    torch.testing.assert_close(losses["loss"], expected["loss"], rtol=0.02, atol=0)
    gradient, coarse = (torch.from_numpy(flat(each.gradients)) for each in (exact, state))
    assert torch.cosine_similarity(gradient, coarse, dim=0) > 0.98
    assert {gradient.dtype for gradient in state.gradients} == {torch.float32}


def test_a_bf16_copy_follows_weights_that_move_by_less_than_it_can_tell() -> None:
    optim = replace(OPTIM, ct_steps=100, lr=1e-5)
    recipe, model = replace(RECIPE, optim=optim), filled_model()
    state = build_state(model, optim, bf16_copy(model))
    start = weights(state)
    for _ in range(4):
        before = weights(state)
        train_step(state, part(BATCH, slice(2)), recipe, distance)
        assert [name for name, p in weights(state).items() if torch.equal(before[name], p)] == []
    for name, copied in state.network.named_parameters():
        assert copied.dtype == torch.bfloat16
        assert torch.equal(copied, state.model.get_parameter(name).bfloat16())
        assert not torch.equal(state.model.get_parameter(name), start[name])
    assert {p.dtype for p in (*state.model.parameters(), *state.ema_model.parameters())} == {torch.float32}


def test_gradients_of_parts_add_up_in_float32_beside_a_bf16_copy() -> None:
    found = []
    for size in (None, 1):
        state = copy_state()
        train_step(state, BATCH, RECIPE, distance, size)
        found.append(torch.from_numpy(flat(state.gradients)))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99
    assert found[1].norm() == pytest.approx(found[0].norm().item(), rel=0.05)
    assert not torch.equal(found[1].float(), found[1].float().bfloat16().float())


@pytest.mark.slow
def test_a_compiled_step_shares_the_dropout_mask_and_its_losses_are_near() -> None:
    recipe = replace(RECIPE, schedule=ScheduleConfig(s0=1000, s1=1000, noise_rho=1e-4, res_rho=1e-4))
    compiled = build_state(filled_model(replace(NETWORK, dropout=0.5)), OPTIM)
    plain = build_state(filled_model(replace(NETWORK, dropout=0.5)), OPTIM)
    compile_step(compiled)
    losses, expected = (
        train_step(each, part(BATCH, slice(2)), recipe, distance) for each in (compiled, plain)
    )
    assert losses["charbonnier"] < 3 * expected["charbonnier"]


@pytest.mark.slow
def test_a_compiled_network_takes_the_same_steps() -> None:
    plain, compiled = build_state(filled_model(), OPTIM), build_state(filled_model(), OPTIM)
    compile_step(compiled)
    for _ in range(2):
        expected = train_step(plain, part(BATCH, slice(2)), RECIPE, distance)
        losses = train_step(compiled, part(BATCH, slice(2)), RECIPE, distance)
        torch.testing.assert_close(losses["loss"], expected["loss"], rtol=1e-4, atol=0)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize("version", [1, 2])
def test_noise_belongs_to_the_sample_not_to_its_batch(version: NoiseVersion) -> None:
    whole = sample_noise(BATCH, 7, "ct", version)
    assert whole.shape == (4, 3, 32, 32)
    assert torch.equal(sample_noise(part(BATCH, slice(1, 3)), 7, "ct", version), whole[1:3])
    shuffled = [2, 0, 3, 1]
    regrouped = replace(part(BATCH, slice(4)), samples=[BATCH.samples[i] for i in shuffled])
    assert torch.equal(sample_noise(regrouped, 7, "ct", version), whole[shuffled])


def test_a_run_keeps_the_noise_it_began_with() -> None:
    losses = [
        train_step(
            build_state(filled_model(), OPTIM), BATCH, replace(RECIPE, noise_version=version), distance
        )
        for version in (1, 2)
    ]
    assert losses[0]["loss"] != losses[1]["loss"]
    assert RECIPE.noise_version == 2


def test_noise_differs_by_sample_seed_and_purpose() -> None:
    batch = make_batch([0, 1, 2, 3], lq_size=16)
    whole = sample_noise(batch, 7, "ct")
    others = [whole[1], sample_noise(batch, 8, "ct")[0], sample_noise(batch, 7, "dtm")[0]]
    assert all(abs((whole[0] * other).mean()) < 0.05 for other in others)
    assert abs(whole.mean()) < 0.02
    assert abs(whole.std() - 1) < 0.02


@pytest.mark.parametrize("step", [0, 1, 2])
def test_losses_of_the_parts_average_to_that_of_the_whole(step: int) -> None:
    state = build_state(filled_model(), OPTIM)
    state.global_step = step
    state.refresh_dtm_model()
    with torch.no_grad():
        whole = compute_losses(state, BATCH, RECIPE, distance)
        halves = [
            compute_losses(state, part(BATCH, rows), RECIPE, distance) for rows in (slice(2), slice(2, 4))
        ]
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, rtol=1e-5, atol=1e-7)


def test_prediction_and_target_share_the_dropout_mask() -> None:
    # Levels (i/N)^0.0001: all but the first are almost equal, so x_n and x_{n+1} are almost the same point,
    # and only another mask could set pred and target apart.
    recipe = replace(RECIPE, schedule=ScheduleConfig(s0=1000, s1=1000, noise_rho=1e-4, res_rho=1e-4))
    state = build_state(filled_model(replace(NETWORK, dropout=0.5)), OPTIM)
    batch = part(BATCH, slice(2))
    state.model.train()
    losses = compute_losses(state, batch, recipe, distance)
    x, lq = torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 16, 16)
    apart = (state.model(x, torch.tensor(1.0), lq) - state.model(x, torch.tensor(1.0), lq)).abs().mean()
    assert losses["charbonnier"] < 0.05 * apart


def test_dropout_does_not_depend_on_what_ran_before() -> None:
    results = []
    for draws in (0, 3):
        torch.rand(draws)
        state = build_state(filled_model(replace(NETWORK, dropout=0.5)), OPTIM)
        results.append(train_step(state, part(BATCH, slice(2)), RECIPE, distance)["loss"])
    assert results[0] == results[1]
