"""A training step's kernels on the published network's kinds of blocks, at tiny width; times by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from ctmsr.model.network import NetworkConfig, ResidualBlock
from ctmsr.training.losses import LossConfig
from pipelines.config.presets import published
from tests.benchmarks.kernels import Kernel, Trace, View, fused
from tests.benchmarks.machine import CARDS, Card, card_of
from tests.benchmarks.roofline import (
    BACKWARD,
    FORWARD,
    NETWORK,
    PARTS,
    TARGET,
    measured_ms,
    predict,
    trace_of,
)
from tests.benchmarks.train_step import GPU

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # torch's own

NARROW = replace(
    published().network, model_channels=16, channel_mult=(1, 2), num_blocks=1, embed_dim=32, num_heads=2
)
AUTOCAST, COPY = GPU[2:]


@pytest.fixture(scope="module")
def steps() -> dict[str, Trace]:
    """A first step of 2 images, in bf16 by autocast and by a copy of the weights."""
    config = replace(published(), network=NARROW, loss=LossConfig())
    return {form.name: trace_of(form, config, 2, num_before=0) for form in (AUTOCAST, COPY)}


def launches(kernels: list[Kernel], parts: tuple[str, ...]) -> int:
    return sum(kernel.num_launches for kernel in kernels if kernel.part in parts)


def test_no_step_reads_what_the_gpu_computes(steps: dict[str, Trace]) -> None:
    """A shape that depends on values (`nonzero`, `masked_select`) would raise: fake tensors have none."""
    assert [step.host_reads for step in steps.values()] == [[], []]


def test_all_parts_of_a_step_are_found_in_their_order(steps: dict[str, Trace]) -> None:
    found = list(dict.fromkeys(kernel.part for kernel in steps[COPY.name].kernels))
    assert found == list(PARTS)
    flops = dict.fromkeys(PARTS, 0)
    for kernel in steps[COPY.name].kernels:
        flops[kernel.part] += kernel.flops
    assert flops[TARGET] == flops[FORWARD] > 0
    # Twice as much, but that attention's backward pass recomputes a product and the input needs no gradient.
    assert flops[BACKWARD] == pytest.approx(2 * flops[FORWARD], rel=0.03)


def test_a_copy_of_the_weights_needs_no_casts(steps: dict[str, Trace]) -> None:
    autocast, copy = (sum(k.is_cast for k in steps[form.name].kernels) for form in (AUTOCAST, COPY))
    assert copy <= 40 < 200 <= autocast
    # What is left: pictures, noise and LPIPS; in the network, its inputs and output, forward and backward.
    in_network = [k for k in steps[COPY.name].kernels if k.is_cast and k.part in NETWORK]
    assert len(in_network) <= 12


def test_compiled_the_network_takes_at_most_half_as_many_kernels(steps: dict[str, Trace]) -> None:
    compiled = fused(steps[COPY.name].kernels, NETWORK)
    assert launches(compiled, NETWORK) <= launches(steps[AUTOCAST.name].kernels, NETWORK) / 2
    assert launches(compiled, NETWORK) < 0.55 * launches(steps[COPY.name].kernels, NETWORK)
    others = tuple(part for part in PARTS if part not in NETWORK)
    assert launches(compiled, others) == launches(steps[COPY.name].kernels, others)
    flops, flops_compiled = (sum(k.flops for k in some) for some in (steps[COPY.name].kernels, compiled))
    assert flops == flops_compiled


def kernel(part: str, *, flops: int = 0, num_bytes: int = 0, num_launches: int = 1) -> Kernel:
    reads = [View(0, (), num_bytes)]
    return Kernel("", part, "product", reads, flops=flops, arithmetic="bf16", num_launches=num_launches)


def test_a_kernel_waits_for_the_longer_of_product_and_memory_and_for_its_launch() -> None:
    card = Card(bf16=100.0, tf32=50.0, fp32=10.0, bandwidth=10.0)
    kernels = [
        kernel(FORWARD, flops=300, num_bytes=10),  # 3 s of product, 1 s of memory
        kernel(FORWARD, num_bytes=20),
        kernel(BACKWARD, num_bytes=10, num_launches=9),
    ]
    free = predict(kernels, card, launch_s=0)
    assert (free["all"].products, free["all"].memory, free["all"].elapsed) == (3, 4, 6)
    slow = predict(kernels, card, launch_s=1)
    # Launched after 1, 2 and 11 s; the GPU is ready after 4, 6 and 12 s.
    assert (slow[FORWARD].elapsed, slow[BACKWARD].elapsed) == (6, 6)
    assert (slow["all"].elapsed, slow["all"].device) == (12, 6)


def test_the_measurement_stands_beside_its_own_setting_only() -> None:
    assert measured_ms("published", 8, "h100")["plain"] > 100
    assert measured_ms("published", 4, "h100") == measured_ms("published", 8, "a100") == {}
    assert card_of("NVIDIA H200, torch 2.11.0+cu130") == CARDS["h200"]
    assert card_of("2 CPU cores, torch 2.13.0+cpu") is None


@pytest.mark.slow
@pytest.mark.parametrize("attention", [False, True])
def test_inductor_makes_no_more_kernels_of_a_block_than_the_rule_says(attention: bool) -> None:
    config = NetworkConfig(model_channels=32, embed_dim=32, num_heads=2, window_size=8)
    block = ResidualBlock(config, 32, 32, 128, attention=attention).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, emb = torch.randn(2, 32, 32, 32).to(memory_format=torch.channels_last), torch.randn(2, 128)

    def passes(module: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        module(*(value.detach().requires_grad_() for value in inputs)).sum().backward()

    compiled = torch.compile(block, dynamic=False)
    _, codes = run_and_get_code(lambda: passes(compiled, x, emb))
    found = sum(code[code.index("def call(") :].count(" cpp_fused_") for code in codes)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for owner in block.modules():
            for name, value in owner.named_parameters(recurse=False):
                setattr(owner, name, nn.Parameter(mode.from_tensor(value.detach())))
            for name, value in owner.named_buffers(recurse=False):
                setattr(owner, name, mode.from_tensor(value))
        with Trace() as trace:
            passes(block, mode.from_tensor(x), mode.from_tensor(emb))
    by_rule = [kernel for kernel in fused(trace.kernels, [""]) if kernel.kind != "product"]
    assert 0.4 * len(by_rule) < found <= len(by_rule)
