"""What only a GPU can tell. Needs torch and pytest alone: `pytest -m gpu tests/unit/ctmsr/test_gpu.py`.

LPIPS comes from the cache, or from the file of `lpips_tensors("vgg")` that CTMSR_LPIPS names.
"""

import copy
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ctmsr.metrics.full_reference import psnr_y
from ctmsr.metrics.perceptual import Lpips, load_lpips
from ctmsr.model.device import prefetch, use_fast_math
from ctmsr.model.graphs import replay_graphs
from ctmsr.model.inference import InferenceConfig, for_inference, upscale
from ctmsr.model.network import ConsistencyModel, bf16_copy
from ctmsr.model.noise import normal, position_noise
from ctmsr.model.schedule import ScheduleConfig
from ctmsr.training.objective import Batch, compute_losses
from ctmsr.training.state import TrainState, build_state
from ctmsr.training.step import check_finite, compile_step, train_step
from tests.benchmarks.plain import PlainTraining
from tests.benchmarks.replay import replay_network
from tests.support import tiny
from tests.support.fixture_inputs import tensor
from tests.support.tiny import OPTIM, RECIPE, distance, filled_model, make_batch

pytestmark = pytest.mark.gpu

NETWORK = replace(tiny.NETWORK, lq_size=16, window_size=8)
GPU = torch.device("cuda")
LAST = torch.channels_last


class Distance(nn.Module):
    """The tests' smooth distance, as a module that can be compiled; `lpips` makes it the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", tensor("distance", (8, 3, 5, 5)) / 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        features = (torch.tanh(nn.functional.conv2d(x, self.get_buffer("filters"))) for x in (a, b))
        return (next(features) - next(features)).square().mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def vgg() -> Lpips:
    path = os.environ.get("CTMSR_LPIPS")
    lpips = Lpips(load_file(path), "bf16") if path else load_lpips("vgg", "bf16")
    return lpips.to(GPU, memory_format=LAST)  # type: ignore[call-overload]


def fast_state(model: ConsistencyModel) -> TrainState:
    """As training on a GPU has it: channels last, and a bf16 copy that computes."""
    model = copy.deepcopy(model).to(GPU, memory_format=LAST)  # type: ignore[call-overload]
    return build_state(model, OPTIM, bf16_copy(model))


def batches(num: int) -> Iterator[Batch]:
    for step in range(num):
        yield make_batch([2 * step, 2 * step + 1], NETWORK.lq_size)


@pytest.mark.parametrize("offset", [0, 3])
def test_noise_is_that_of_the_cpu(offset: int) -> None:
    seeds = [2**k + offset for k in range(60)]
    found, expected = (normal(seeds, (3, 64, 64), device) for device in (GPU, torch.device("cpu")))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-6)
    window = slice(offset, 500), slice(offset, 300)
    torch.testing.assert_close(
        position_noise(5, *window, GPU).cpu(), position_noise(5, *window), rtol=0, atol=2e-6
    )


@pytest.fixture
def waits_are_told() -> Iterator[None]:
    """Whatever a test sets, the next one may wait."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waits_are_told")
@pytest.mark.parametrize("parts", [None, 1])
def test_no_step_makes_the_host_wait(vgg: Lpips, parts: int | None) -> None:
    state = fast_state(filled_model(replace(NETWORK, dropout=0.1)))  # CT, then DTM with a new frozen copy
    for step, batch in enumerate(prefetch(batches(8), GPU)):
        train_step(state, batch, RECIPE, vgg, parts)
        # The first steps load kernels and ask cuDNN; from then on a wait is an error.
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
    torch.cuda.set_sync_debug_mode("default")
    check_finite(state)


def test_batches_arrive_whole_while_the_gpu_is_busy() -> None:
    busy, sums = torch.randn(4096, 4096, device=GPU), []
    for batch in prefetch(batches(6), GPU):
        assert batch.hr_u8.device.type == "cuda"
        for _ in range(5):
            busy = busy @ busy / busy.norm()
        sums.append((batch.hr_u8.sum(), batch.lq_u8.sum()))
    expected = [(batch.hr_u8.sum(), batch.lq_u8.sum()) for batch in batches(6)]
    assert [(int(a), int(b)) for a, b in sums] == [(int(a), int(b)) for a, b in expected]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_prediction_and_target_share_the_dropout_mask(is_compiled: bool) -> None:
    # As in training/test_step.py: all points of the trajectory are almost equal, only masks could differ.
    recipe = replace(RECIPE, schedule=ScheduleConfig(s0=1000, s1=1000, noise_rho=1e-4, res_rho=1e-4))
    for state in (
        build_state(filled_model(replace(NETWORK, dropout=0.5)).to(GPU), OPTIM),
        fast_state(filled_model(replace(NETWORK, dropout=0.5))),
    ):
        state.parallel.train()
        lpips = Distance().to(GPU)
        if is_compiled:
            compile_step(state)
        (batch,) = prefetch(batches(1), GPU)
        for step in range(3):
            state.global_step = step
            losses = compute_losses(state, batch, recipe, lpips)
            losses["loss"].backward()
            state.drop_gradients()
            x, lq = torch.zeros(2, 3, 64, 64, device=GPU), torch.zeros(2, 3, 16, 16, device=GPU)
            with torch.no_grad():
                first = state.network(x, torch.tensor(1.0), lq).clone()
                apart = (first - state.network(x, torch.tensor(1.0), lq)).abs().mean()
            assert apart > 0
            assert losses["charbonnier"] < 0.2 * apart, (step, losses, apart)


@pytest.mark.parametrize("parts", [None, 1])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_losses_follow_the_plain_form(is_compiled: bool, parts: int | None) -> None:
    use_fast_math()
    torch.manual_seed(0)
    model = ConsistencyModel(NETWORK)
    recipe = replace(RECIPE, optim=replace(OPTIM, ct_steps=100, lr=1e-4))
    plain = PlainTraining(model.to(GPU), recipe, distance_on_gpu())
    state, lpips = fast_state(model), Distance().to(GPU)
    if is_compiled:
        compile_step(state)
    found, expected = [], []
    for batch in prefetch(batches(20), GPU):
        expected.append(plain.step(batch))
        found.append(train_step(state, batch, recipe, lpips, parts)["loss"].clone())
    losses, gradients = torch.stack(found).cpu().numpy(), state.gradients
    assert np.abs(losses / expected - 1).max() < 0.03
    assert abs(losses.mean() / np.mean(expected) - 1) < 0.005
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_replayed_steps_are_those_that_launch_every_kernel() -> None:
    recipe = replace(RECIPE, optim=replace(OPTIM, ct_steps=100, lr=1e-4))
    model, lpips = filled_model(replace(NETWORK, dropout=0.1)), Distance().to(GPU)
    eager, replayed = fast_state(model), fast_state(model)
    replay_network(replayed, size=2)
    for batch in prefetch(batches(12), GPU):
        expected, found = (train_step(state, batch, recipe, lpips) for state in (eager, replayed))
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-3, atol=0)
        torch.testing.assert_close(found["grad_norm"], expected["grad_norm"], rtol=0.03, atol=0)


def distance_on_gpu() -> nn.Module:
    """In float32."""
    return Distance().to(GPU)


def test_the_smooth_distance_is_that_of_the_cpu_tests() -> None:
    a, b = tensor("a", (2, 3, 32, 32)), tensor("b", (2, 3, 32, 32))
    torch.testing.assert_close(Distance()(a, b), distance(a, b))


def picture() -> np.ndarray:
    smooth = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(smooth, (90, 70), mode="bicubic").clamp(0, 1)
    pixels: np.ndarray = (255 * smooth[0].permute(1, 2, 0)).byte().numpy()
    return pixels


def test_pictures_are_those_of_the_cpu() -> None:
    model, config = filled_model(NETWORK).eval(), InferenceConfig(tile=48, overlap=16, batch_tiles=3)
    expected = upscale(model, picture(), sigma_max=1.0, config=config).astype(int)
    found = upscale(copy.deepcopy(model).to(GPU), picture(), sigma_max=1.0, config=config)
    difference = np.abs(found - expected)
    assert difference.max() <= 4  # convolutions in TF32
    assert difference.mean() < 0.3


@pytest.mark.parametrize("replayed", [False, True])
def test_bf16_pictures_are_near_those_of_float32(replayed: bool) -> None:
    torch.manual_seed(0)
    model = ConsistencyModel(NETWORK).eval()
    expected = upscale(model, picture(), sigma_max=1.0)
    config = InferenceConfig(precision="bf16")
    fast = for_inference(copy.deepcopy(model), GPU, config)
    fast = replay_graphs(fast) if replayed else fast
    for _ in range(3):
        found = upscale(fast, picture(), sigma_max=1.0, config=config)
        assert psnr_y(found, expected, crop_border=0) > 45


def test_replayed_graphs_give_the_same_pictures_of_every_shape_and_from_every_thread() -> None:
    config = InferenceConfig(tile=48, overlap=16, batch_tiles=2)
    model = for_inference(filled_model(NETWORK), GPU, config)
    pictures = [np.ascontiguousarray(picture()[: 40 + 10 * size]) for size in range(6)]
    expected = [upscale(model, pixels, sigma_max=1.0, seed=3, config=config) for pixels in pictures]
    replay_graphs(model)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            upscaled = partial(upscale, model, sigma_max=1.0, seed=3, config=config)
            for found, right in zip(threads.map(upscaled, pictures), expected, strict=True):
                np.testing.assert_array_equal(found, right)
