"""The objectives against forms worked out by hand."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ctmsr.errors import ConfigError
from ctmsr.training.losses import (
    LossConfig,
    alignment_loss,
    charbonnier,
    consistency_loss,
    dtm_loss,
    dtm_range,
)
from tests.support.fixture_inputs import tensor

CONFIG = LossConfig()


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
