"""Which losses a step computes, from which points, and that it does not matter who computes them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ctmsr.image.ranges import to_tensor, upsample
from ctmsr.model.schedule import ScheduleConfig, trajectory_levels
from ctmsr.rng import sample_seed
from ctmsr.training.losses import LossConfig, alignment_loss, consistency_loss
from ctmsr.training.objective import Batch, Recipe, compute_losses, sample_noise
from ctmsr.training.state import TrainState, build_state
from tests.support.tiny import OPTIM, RECIPE, distance, filled_model, flat, make_batch

BATCH = make_batch([20, 21, 22, 23])
LARGER = make_batch(BATCH.samples, lq_size=16)
"""For LPIPS of crops, which must have 32 pixels."""
HR, LQ = to_tensor(BATCH.hr_u8), to_tensor(BATCH.lq_u8)
LQ_UP = upsample(LQ, 4)
N = 4
ALPHAS, SIGMAS = trajectory_levels(ScheduleConfig(), N)
OPTIONS = {
    "published": LossConfig(),
    "regression": LossConfig(hr_target_until=1.0),
    "regression_at_the_last": LossConfig(hr_target_until=1.0, steps="last"),
    "step_per_image": LossConfig(step_per_image=True),
    "alignment": LossConfig(alignment_weight=1.0),
    "alignment_per_image": LossConfig(alignment_weight=1.0, step_per_image=True),
    "crops": LossConfig(lpips_crop=0.5, lpips_zoom=1.5, alignment_weight=1.0),
}


def recipe_of(config: LossConfig, steps: int = N) -> Recipe:
    return replace(RECIPE, loss=config, schedule=ScheduleConfig(s0=steps, s1=steps))


def state_at(step: int, *, dtm: bool = False) -> TrainState:
    state = build_state(filled_model(), OPTIM)
    state.global_step = step
    if dtm:
        state.refresh_dtm_model()
    return state


def calls(model: nn.Module) -> list[Tensor]:
    """A list that grows by the noise levels of each call of `model`."""
    found: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, arguments: found.append(arguments[1]))
    return found


def step_with(n: int) -> int:
    """The first step of the tiny run that draws this n."""
    return next(k for k in range(OPTIM.total_steps) if sample_seed(0, "n", k) % N == n)


def rows_of(batch: Batch, rows: slice) -> Batch:
    return replace(
        batch,
        hr_u8=batch.hr_u8[rows],
        lq_u8=batch.lq_u8[rows],
        samples=batch.samples[rows],
        keys=batch.keys[rows],
    )


@pytest.mark.parametrize("dtm", [False, True])
@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_several_workers_compute_what_one_computes(config: LossConfig, dtm: bool) -> None:
    state, recipe = state_at(1, dtm=dtm), recipe_of(config)
    batch = BATCH if config.lpips_crop == 1 else LARGER
    found = []
    for parts in ([slice(4)], [slice(2), slice(2, 4)], [slice(i, i + 1) for i in range(4)]):
        state.model.zero_grad()
        losses = [compute_losses(state, rows_of(batch, rows), recipe, distance) for rows in parts]
        means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
        means["loss"].backward()
        gradient = torch.from_numpy(flat([p.grad for p in state.model.parameters() if p.grad is not None]))
        found.append(({name: value.item() for name, value in means.items()}, gradient))
    (whole, gradient), *others = found
    for values, other in others:
        assert values == pytest.approx(whole, rel=2e-5)
        assert (other - gradient).norm() < 5e-3 * gradient.norm()


@pytest.mark.parametrize("steps", ["all", "last"])
def test_hr_targets_are_plain_regression_and_call_one_network(steps: str) -> None:
    state = state_at(step_with(2))
    noise_levels = calls(state.model)
    losses = compute_losses(state, BATCH, recipe_of(LossConfig(hr_target_until=1.0, steps=steps)), distance)  # type: ignore[arg-type]
    t = N if steps == "last" else 3
    assert [level.tolist() for level in noise_levels] == [[SIGMAS[t].item()] * 4]

    x_t = HR + ALPHAS[t] * (LQ_UP - HR) + SIGMAS[t] * sample_noise(BATCH, 0, "ct")
    expected = consistency_loss(state.model(x_t, SIGMAS[t], LQ), HR, distance, LossConfig())
    assert losses.keys() == expected.keys() | {"loss"}
    assert torch.equal(losses["loss"], expected["ct_loss"])


def test_self_consistency_takes_over_at_its_share_of_the_run() -> None:
    recipe = recipe_of(LossConfig(hr_target_until=0.5))
    targets = []
    for step in range(OPTIM.total_steps):
        state = state_at(step)
        noise_levels = calls(state.model)
        compute_losses(state, BATCH, recipe, distance)
        targets.append(len(noise_levels) - 1)
    expected = [int(step >= 3 and sample_seed(0, "n", step) % N > 0) for step in range(6)]
    assert targets == expected
    assert 1 in targets


def test_every_image_draws_a_step_of_its_own() -> None:
    state, recipe = state_at(0), recipe_of(LossConfig(step_per_image=True))
    batch = make_batch(list(range(200, 208)))
    noise_levels = calls(state.model)
    compute_losses(state, batch, recipe, distance)
    target, pred = noise_levels
    drawn = [sample_seed(0, "n", k) % N for k in batch.samples]
    assert len(set(drawn)) == N, "the samples should cover all steps"
    assert torch.equal(target, SIGMAS[drawn])
    assert torch.equal(pred, SIGMAS[[n + 1 for n in drawn]])
    counts = Counter(sample_seed(0, "n", k) % N for k in range(4000))
    assert all(abs(counts[n] - 1000) < 120 for n in range(N))


def test_images_at_the_first_step_have_the_hr_picture_as_target_among_others() -> None:
    batch = make_batch(list(range(200, 208)))
    first = [i for i, k in enumerate(batch.samples) if sample_seed(0, "n", k) % N == 0]
    assert 0 < len(first) < 8
    targets = []

    def watch(a: Tensor, b: Tensor) -> Tensor:
        targets.append(b)
        return distance(a, b)

    compute_losses(state_at(0), batch, recipe_of(LossConfig(step_per_image=True)), watch)
    same = [bool(torch.equal(a, b)) for a, b in zip(targets[0], to_tensor(batch.hr_u8), strict=True)]
    assert [i for i, equal in enumerate(same) if equal] == first


def test_alignment_is_added_at_one_inner_point_with_noise_of_its_own() -> None:
    config, step = LossConfig(alignment_weight=0.5), step_with(2)
    state = state_at(step)
    losses = compute_losses(state, BATCH, recipe_of(config), distance)
    torch.testing.assert_close(losses["loss"], losses["ct_loss"] + losses["alignment_loss"])

    x_next = HR + ALPHAS[3] * (LQ_UP - HR) + SIGMAS[3] * sample_noise(BATCH, 0, "ct")
    pred = state.model(x_next, SIGMAS[3], LQ)
    noise, t = sample_noise(BATCH, 0, "alignment"), 1 + sample_seed(0, "t", step) % (N - 1)
    expected = alignment_loss(
        pred,
        HR,
        LQ_UP,
        noise,
        alpha=ALPHAS[[t] * 4],
        sigma=SIGMAS[[t] * 4],
        num_steps=N,
        lpips=distance,
        config=config,
    )
    assert torch.equal(losses["alignment_loss"], expected)
    assert {1 + sample_seed(0, "t", k) % (N - 1) for k in range(50)} == {1, 2, 3}


def test_alignment_leaves_the_consistency_loss_alone_and_is_absent_without_inner_points() -> None:
    plain = compute_losses(state_at(1), BATCH, recipe_of(LossConfig()), distance)
    aligned = compute_losses(state_at(1), BATCH, recipe_of(LossConfig(alignment_weight=1.0)), distance)
    assert "alignment_loss" not in plain
    assert all(torch.equal(aligned[name], plain[name]) for name in ("ct_loss", "lpips", "charbonnier"))
    assert torch.equal(plain["loss"], plain["ct_loss"])
    one = compute_losses(state_at(1), BATCH, recipe_of(LossConfig(alignment_weight=1.0), steps=1), distance)
    assert "alignment_loss" not in one


def test_lpips_of_crops_moves_lpips_alone() -> None:
    whole = compute_losses(state_at(1), LARGER, recipe_of(LossConfig()), distance)
    crops = compute_losses(state_at(1), LARGER, recipe_of(LossConfig(lpips_crop=0.5)), distance)
    assert torch.equal(crops["charbonnier"], whole["charbonnier"])
    assert crops["lpips"] != whole["lpips"]
    assert crops["lpips"].item() == pytest.approx(whole["lpips"].item(), rel=0.6)  # an estimate of it
