"""The objectives against the published ones, and against forms worked out by hand."""

import copy
import json
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctmsr.errors import ConfigError
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.model.network import ConsistencyModel
from ctmsr.model.schedule import ScheduleConfig, trajectory_levels
from ctmsr.model.trajectory import trajectory_point
from ctmsr.training.losses import (
    Distance,
    LossConfig,
    alignment_loss,
    charbonnier,
    consistency_loss,
    dtm_loss,
    dtm_range,
)
from tests.support.fixture_inputs import TINY, fill_weights, tensor
from tests.support.repository import FIXTURES

CONFIG = LossConfig()
REFERENCE = json.loads((FIXTURES / "loss_fixture.json").read_text())
ALPHAS, SIGMAS = trajectory_levels(ScheduleConfig(), 3)
ULP = 1e-7  # relative; changes about every float32 in its last bit

HR = (0.4 * tensor("hr", (2, 3, 256, 256))).clamp(-1, 1)
LQ = F.interpolate(HR, scale_factor=0.25, mode="area")
LQ_UP = F.interpolate(LQ, scale_factor=4, mode="bicubic", align_corners=False)


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    model = ConsistencyModel(TINY)
    fill_weights(model)
    return model


@pytest.fixture(scope="module")
def lpips() -> Distance:
    return load_lpips("vgg")


def predict(model: ConsistencyModel, noise: Tensor, t: int) -> Tensor:
    return model(trajectory_point(HR, LQ_UP, noise, ALPHAS[t], SIGMAS[t]), SIGMAS[t], LQ)


def grad_norms(model: ConsistencyModel, loss: Tensor) -> dict[str, float]:
    model.zero_grad()
    loss.backward()
    norms = {
        "grad_norm": nn_norm([p.grad for p in model.parameters() if p.grad is not None]),
        "g_conv_last": nn_norm([model.get_parameter("model.conv_last.weight").grad]),
        "g_first": nn_norm([model.get_parameter("model.enc.64x64_conv.weight").grad]),
    }
    model.zero_grad()
    return norms


def nn_norm(gradients: list[Any]) -> float:
    return torch.nn.utils.get_total_norm(gradients).item()


def published_ct(
    model: ConsistencyModel, lpips: Distance, n: int, ulps: int = 0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    noise = tensor("ct_eps", tuple(HR.shape)) * (1 + ulps * ULP)
    with torch.no_grad():
        target = predict(model, noise, n)
    losses = consistency_loss(predict(model, noise, n + 1), target, lpips, CONFIG)
    return losses, grad_norms(model, losses["ct_loss"])


def published_dtm(
    model: ConsistencyModel, lpips: Distance, ulps: int = 0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    sr = predict(model, tensor("ct_eps", tuple(HR.shape)) * (1 + ulps * ULP), 3)
    directions = []

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        directions.append((a - b).detach())
        return lpips(a, b)

    loss = dtm_loss(
        sr,
        HR,
        LQ,
        LQ_UP,
        tensor("dtm_eps", tuple(HR.shape)),
        alpha=ALPHAS[[1, 1]],
        sigma=SIGMAS[[1, 1]],
        dtm_model=copy.deepcopy(model).eval(),
        lpips=recorded,
        config=CONFIG,
    )
    values = {
        "loss": loss,
        "w": 1 / (sr - HR).detach().abs().mean(dim=(1, 2, 3)),
        "d_abs": directions[0].abs().mean(),
    }
    return values, grad_norms(model, loss)


# Gradient norms are ill-conditioned: noise that differs in the last bit of float32 moves some activation of
# VGG over the kink of its ReLU, and with it the norm of the whole gradient by up to 0.4 %. One evaluation is
# therefore held to 1 %; the slow tests below find the published norm among last-bit neighbours, to 0.1 %.
ONE, CLOSEST = 1e-2, 1e-3
NUM_NEIGHBOURS = 6


@pytest.mark.parametrize("n", [0, 1, 2])
def test_ct_is_the_published_one(model: ConsistencyModel, lpips: Distance, n: int) -> None:
    expected = REFERENCE[f"ct_n{n}"]
    losses, norms = published_ct(model, lpips, n)
    assert losses["lpips"].item() == pytest.approx(expected["lpips"], rel=1e-5)
    assert losses["charbonnier"].item() == pytest.approx(expected["charbonnier"], rel=1e-5)
    assert losses["ct_loss"].item() == pytest.approx(expected["loss"], rel=1e-5)
    assert norms["g_conv_last"] == pytest.approx(expected["g_conv_last"], rel=1e-3)
    assert norms["grad_norm"] == pytest.approx(expected["grad_norm"], rel=ONE)
    assert norms["g_first"] == pytest.approx(expected["g_first"], rel=ONE)


def test_dtm_is_the_published_one(model: ConsistencyModel, lpips: Distance) -> None:
    expected = REFERENCE["dtm"]
    values, norms = published_dtm(model, lpips)
    assert values["loss"].item() == pytest.approx(expected["loss"], rel=1e-5)
    assert values["w"].tolist() == pytest.approx(expected["w"], rel=1e-5)
    assert values["d_abs"].item() == pytest.approx(expected["d_abs"], rel=1e-5)
    assert norms["grad_norm"] == pytest.approx(expected["grad_norm"], rel=ONE)


def assert_among_neighbours(found: list[float], expected: float) -> None:
    errors = [abs(value / expected - 1) for value in found]
    assert min(errors) <= CLOSEST, found
    assert max(errors) <= ONE, found


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 2])
def test_ct_gradient_is_among_last_bit_neighbours(model: ConsistencyModel, lpips: Distance, n: int) -> None:
    norms = [published_ct(model, lpips, n, ulps)[1] for ulps in range(NUM_NEIGHBOURS)]
    for name in ("grad_norm", "g_first"):
        assert_among_neighbours([each[name] for each in norms], REFERENCE[f"ct_n{n}"][name])


@pytest.mark.slow
def test_dtm_gradient_is_among_last_bit_neighbours(model: ConsistencyModel, lpips: Distance) -> None:
    norms = [published_dtm(model, lpips, ulps)[1]["grad_norm"] for ulps in range(NUM_NEIGHBOURS)]
    assert_among_neighbours(norms, REFERENCE["dtm"]["grad_norm"])


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3))


SMALL = (3, 3, 8, 8)
SR, X_0, Y_0, NOISE = (tensor(name, SMALL) for name in ("sr", "x_0", "y_0", "noise"))
ALPHA, SIGMA = torch.tensor([0.25, 0.5, 0.75]), torch.tensor([0.1, 0.5, 1.0])


def small_dtm(sr: Tensor, *, dtm_model: Any, config: LossConfig = CONFIG) -> Tensor:
    return dtm_loss(
        sr,
        X_0,
        Y_0[..., ::4, ::4],
        Y_0,
        NOISE,
        alpha=ALPHA,
        sigma=SIGMA,
        dtm_model=dtm_model,
        lpips=squared_distance,
        config=config,
    )


def test_charbonnier_closed_form() -> None:
    assert charbonnier(SR, SR).item() == pytest.approx(1e-6, rel=1e-4)
    assert charbonnier(SR, SR + 0.25).item() == pytest.approx(0.25)
    assert charbonnier(SR, SR - 0.25).item() == pytest.approx(0.25)
    mixed = torch.tensor([0.0, 3.0, 4.0])
    assert charbonnier(mixed, torch.zeros(3)).item() == pytest.approx(7 / 3)


def test_charbonnier_has_a_gradient_at_equal_images() -> None:
    sr = SR.clone().requires_grad_()
    charbonnier(sr, SR).backward()
    assert torch.equal(sr.grad, torch.zeros(SMALL))  # type: ignore[arg-type]


def test_consistency_loss_weighs_its_two_terms() -> None:
    # Every pixel is off by 0.5: squared distance 0.25, Charbonnier 0.5.
    losses = consistency_loss(
        SR, SR + 0.5, squared_distance, LossConfig(lpips_weight=2.0, charbonnier_weight=3.0)
    )
    assert {name: round(value.item(), 5) for name, value in losses.items()} == {
        "lpips": 0.25,
        "charbonnier": 0.5,
        "ct_loss": 2.0,
    }


def small_alignment(sr: Tensor, num_steps: int = 4) -> Tensor:
    return alignment_loss(
        sr,
        X_0,
        Y_0,
        NOISE,
        alpha=ALPHA,
        sigma=SIGMA,
        num_steps=num_steps,
        lpips=squared_distance,
        config=LossConfig(alignment_weight=2.0, lpips_weight=0.3, charbonnier_weight=0.7),
    )


def test_alignment_and_its_gradient_worked_out_by_hand() -> None:
    # The noise and y_0 cancel: z_t - x_t = (1 - alpha)(o - x_0).
    left = 1 - ALPHA.reshape(-1, 1, 1, 1)
    apart = left * (SR - X_0)
    value = 2.0 * 0.5 * (4 - 1) * (0.3 * apart.square().mean() + 0.7 * apart.abs().mean())
    expected = 2.0 * 0.5 * (4 - 1) * left * (0.3 * 2 * apart + 0.7 * apart.sign()) / SR.numel()

    sr = SR.clone().requires_grad_()
    loss = small_alignment(sr)
    loss.backward()
    assert loss.item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(sr.grad, expected)


def test_alignment_compares_noisy_points_not_the_pictures() -> None:
    # A distance that is not linear sees the noise that the two points share.
    def of_squares(a: Tensor, b: Tensor) -> Tensor:
        return (a.square() - b.square()).mean(dim=(1, 2, 3))

    found = alignment_loss(
        SR,
        X_0,
        Y_0,
        NOISE,
        alpha=ALPHA,
        sigma=SIGMA,
        num_steps=3,
        lpips=of_squares,
        config=LossConfig(alignment_weight=1.0, lpips_weight=1.0, charbonnier_weight=0.0),
    )
    a, s = ALPHA.reshape(-1, 1, 1, 1), SIGMA.reshape(-1, 1, 1, 1)
    z_t, x_t = ((1 - a) * start + a * Y_0 + s * NOISE for start in (SR, X_0))
    assert found.item() == pytest.approx((z_t.square() - x_t.square()).mean().item(), rel=1e-4)


def test_alignment_of_the_hr_image_is_next_to_nothing_and_grows_with_the_steps_it_stands_for() -> None:
    assert small_alignment(X_0).item() < 1e-5
    assert small_alignment(SR, 4) == pytest.approx(3 * small_alignment(SR, 2))


def test_dtm_gradient_worked_out_by_hand() -> None:
    def g(x: Tensor, sigma: Tensor, lq: Tensor) -> Tensor:
        return sigma.reshape(-1, 1, 1, 1) * torch.tanh(x + lq.mean())

    a, s, lq_mean = ALPHA.reshape(-1, 1, 1, 1), SIGMA.reshape(-1, 1, 1, 1), Y_0[..., ::4, ::4].mean()
    z_m = SR + a * (Y_0 - SR) + s * NOISE
    x_m = X_0 + a * (Y_0 - X_0) + s * NOISE
    d = s * (torch.tanh(z_m + lq_mean) - torch.tanh(x_m + lq_mean))
    w = 1 / (SR - X_0).abs().mean(dim=(1, 2, 3), keepdim=True)
    # o - (stopgrad(o) - d) = d, so the mean over C, H, W of its square has the gradient 2 d / (C H W).
    expected = 0.5 * 1.6 / len(SR) * w * 2 * d / SR[0].numel()

    sr = SR.clone().requires_grad_()
    loss = small_dtm(sr, dtm_model=g)
    loss.backward()
    torch.testing.assert_close(sr.grad, expected)
    assert loss.item() == pytest.approx(
        (0.5 * 1.6 * w.flatten() * d.square().mean(dim=(1, 2, 3))).mean().item()
    )


def test_dtm_moves_the_prediction_towards_where_the_frozen_copy_sees_hr() -> None:
    sr = SR.clone().requires_grad_()
    small_dtm(sr, dtm_model=lambda x, sigma, lq: x).backward()
    assert sr.grad is not None
    # With g(x) = x the direction d is (1 - alpha)(o - x_0): descent leads to x_0.
    assert (sr.grad.sign() == (SR - X_0).sign()).all()


def test_dtm_leaves_the_frozen_copy_alone() -> None:
    frozen = torch.nn.Conv2d(3, 3, 1)
    sr = SR.clone().requires_grad_()
    small_dtm(sr, dtm_model=lambda x, sigma, lq: frozen(x)).backward()
    assert frozen.weight.grad is None


def test_dtm_weights_multiply() -> None:
    base = small_dtm(SR, dtm_model=lambda x, sigma, lq: x)
    config = LossConfig(lpips_weight=1.0, dtm_weight=4.8)  # 6 x 0.5 x 1.6
    torch.testing.assert_close(small_dtm(SR, dtm_model=lambda x, sigma, lq: x, config=config), 6 * base)


@pytest.mark.parametrize(
    ("config", "num_steps", "expected"),
    [
        (CONFIG, 3, (1, 2)),  # the published run: always m = 1
        (CONFIG, 4, (1, 2)),
        (CONFIG, 5, (1, 3)),
        (LossConfig(dtm_t_min=0.0, dtm_t_max=1.0), 3, (1, 4)),
        (LossConfig(dtm_t_min=0.5, dtm_t_max=1.0), 7, (4, 8)),
        (LossConfig(dtm_t_max=1.0), 1, (1, 2)),
    ],
)
def test_dtm_range(config: LossConfig, num_steps: int, expected: tuple[int, int]) -> None:
    assert dtm_range(config, num_steps) == expected


def test_an_empty_dtm_range_is_refused() -> None:
    message = (
        "loss.dtm_t_min=0.1 and loss.dtm_t_max=0.5 leave no step to compare on a trajectory of 2 steps. "
        "Raise dtm_t_max to 0.67 or more."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dtm_range(CONFIG, 2)


@pytest.mark.parametrize("num_steps", range(1, 13))
@pytest.mark.parametrize("low", [0.0, 0.1, 0.3, 0.65])
def test_the_advice_for_an_empty_dtm_range_helps(low: float, num_steps: int) -> None:
    with pytest.raises(ConfigError) as caught:
        dtm_range(LossConfig(dtm_t_min=low, dtm_t_max=low + 1e-6), num_steps)
    advised = re.search(r"Raise dtm_t_max to ([\d.]+) or more", str(caught.value))
    assert advised is not None
    first, end = dtm_range(LossConfig(dtm_t_min=low, dtm_t_max=float(advised[1])), num_steps)
    assert end == first + 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lpips_weight": -0.1}, "loss.lpips_weight must be at least 0, got -0.1."),
        ({"charbonnier_weight": math.nan}, "loss.charbonnier_weight must be at least 0, got nan."),
        ({"dtm_weight": -1.0}, "loss.dtm_weight must be at least 0, got -1.0."),
        ({"alignment_weight": -1.0}, "loss.alignment_weight must be at least 0, got -1.0."),
        ({"hr_target_until": 1.5}, "loss.hr_target_until must be in [0, 1], got 1.5."),
        ({"hr_target_until": -0.5}, "loss.hr_target_until must be in [0, 1], got -0.5."),
        ({"lpips_crop": 0.0}, "loss.lpips_crop must be in (0, 1], got 0.0."),
        ({"lpips_crop": 1.5}, "loss.lpips_crop must be in (0, 1], got 1.5."),
        ({"lpips_zoom": 0.5}, "loss.lpips_zoom must be in [1, 4], got 0.5."),
        ({"steps": "last", "hr_target_until": 0.5}, "set loss.hr_target_until=1 as well, got 0.5."),
        ({"dtm_t_min": 0.5}, "must satisfy 0 <= min < max <= 1, got 0.5 and 0.5."),
        ({"dtm_t_min": -0.1}, "must satisfy 0 <= min < max <= 1, got -0.1 and 0.5."),
        ({"dtm_t_max": 1.1}, "must satisfy 0 <= min < max <= 1, got 0.1 and 1.1."),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LossConfig(**values)
