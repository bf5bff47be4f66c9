"""The objectives against the values and gradients of the authors' code."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctmsr.metrics.perceptual import load_lpips
from ctmsr.model.network import ConsistencyModel
from ctmsr.model.schedule import ScheduleConfig, trajectory_levels
from ctmsr.model.trajectory import trajectory_point
from ctmsr.training.losses import Distance, LossConfig, consistency_loss, dtm_loss
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
