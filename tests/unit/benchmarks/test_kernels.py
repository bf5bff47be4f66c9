"""Kernels counted on fake tensors, against numbers worked out by hand."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.benchmarks.kernels import Kernel, Trace, fused

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def names(kernels: list[Kernel]) -> list[str]:
    return [kernel.name for kernel in kernels]


@pytest.mark.parametrize(
    ("dtype", "precision", "arithmetic"),
    [
        (torch.float32, "highest", "fp32"),
        (torch.float32, "high", "tf32"),
        (torch.bfloat16, "highest", "bf16"),
    ],
)
def test_a_matrix_product(
    dtype: torch.dtype, precision: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    a, b = torch.empty(64, 32, dtype=dtype), torch.empty(32, 16, dtype=dtype)
    with Trace() as trace:
        a @ b
    (kernel,) = trace.kernels
    assert (kernel.kind, kernel.flops, kernel.arithmetic) == ("product", 2 * 64 * 32 * 16, arithmetic)
    assert kernel.bytes == dtype.itemsize * (64 * 32 + 32 * 16 + 64 * 16)


def test_a_convolution_and_its_backward_pass() -> None:
    x, weight = torch.empty(2, 3, 8, 8, requires_grad=True), torch.empty(5, 3, 3, 3, requires_grad=True)
    bias = torch.empty(5, requires_grad=True)
    with Trace() as trace:
        out = F.conv2d(x, weight, bias, padding=1)
        out.backward(torch.empty_like(out))
    assert names(trace.kernels) == [
        "convolution",
        "bias",
        "convolution_backward",
        "convolution_backward",
        "bias_backward",
    ]
    of_out, of_x, of_weight = 2 * 5 * 64, 2 * 3 * 64, 5 * 3 * 9
    assert [k.flops for k in trace.kernels if k.kind == "product"] == 3 * [2 * of_out * 3 * 9]
    assert [k.bytes / 4 for k in trace.kernels] == [
        of_out + of_x + of_weight,
        2 * of_out + 5,
        *2 * [of_out + of_x + of_weight],
        of_out + 5,
    ]
    assert {k.arithmetic for k in trace.kernels if k.kind == "product"} == {"tf32"}


def test_attention_with_a_learned_bias_and_its_backward_pass() -> None:
    q, k, v = (torch.empty(6, 2, 64, 16, requires_grad=True) for _ in range(3))
    bias = torch.empty(1, 2, 64, 64, requires_grad=True)
    with Trace() as trace:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out.backward(torch.empty_like(out))
    one_product = 2 * 6 * 2 * 64 * 64 * 16
    # The gradient of the bias is that of every window, which a sum then adds up.
    forward, backward = (kernel for kernel in trace.kernels if kernel.kind == "product")
    assert (forward.flops, backward.flops) == (2 * one_product, 5 * one_product)
    seed_and_offset = 2 * 8
    assert forward.bytes == 4 * (4 * 6 * 2 * 64 * 16 + 2 * 64 * 64 + 6 * 2 * 64) + seed_and_offset
    sums = [kernel.bytes for kernel in trace.kernels if kernel.kind == "reduction"]
    assert sums == [4 * (6 + 1) * 2 * 64 * 64]


def test_bytes_and_launches_of_a_chain_and_of_its_fused_form() -> None:
    x, row = torch.empty(32, 100), torch.empty(100)
    with Trace() as trace:
        a = F.silu(x) * row
        b = (a + row.expand(32, 100)).view(-1, 10)
        c = b.sum(dim=1)
        b * c[:, None]
    assert names(trace.kernels) == ["silu", "mul", "add", "sum", "mul"]
    assert [kernel.bytes / 4 for kernel in trace.kernels] == [6400, 6500, 6500, 3520, 6720]
    # A reduction ends its chain, but what came before it is written for what follows.
    chain, rest = fused(trace.kernels, [""])
    assert chain.name == "silu+mul+add+sum"
    assert (chain.bytes / 4, rest.bytes / 4) == (3200 + 100 + 100 + 3200 + 320, 6720)
    assert chain.num_launches == rest.num_launches == 1
    assert names(fused(trace.kernels, ["another part"])) == names(trace.kernels)


def test_products_stay_apart_and_a_chain_waits_for_all_its_inputs() -> None:
    x, w = torch.empty(16, 16), torch.empty(16, 16)
    with Trace() as trace:
        early = x.neg()
        product = early @ w
        late = early.exp() + product
        late * early
    # `exp` may run with `neg`, but `add` needs the product, which needs `neg`.
    assert names(fused(trace.kernels, [""])) == ["neg+exp", "mm", "add+mul"]
    with Trace() as trace:
        y = x @ w
        y.add_(1)
        z = x @ w
        (y + z).neg()
    # Nothing that `z` needs is in the chain of `y`, which so can wait for it.
    assert names(fused(trace.kernels, [""])) == ["mm", "add_+add+neg", "mm"]


def test_a_norm_copies_channels_last_tensors_until_it_is_compiled() -> None:
    x, conv = (torch.empty(*shape).to(memory_format=LAST) for shape in ((2, 32, 8, 8), (32, 32, 3, 3)))
    with Trace() as trace:
        F.conv2d(F.group_norm(x, 4), conv)
    assert names(trace.kernels) == ["layout", "group_norm_statistics", "group_norm", "layout", "convolution"]
    assert names(fused(trace.kernels, [""])) == ["group_norm_statistics", "group_norm", "convolution"]
    x, conv = x.contiguous(), conv.contiguous()
    with Trace() as trace:
        F.conv2d(F.group_norm(x, 4), conv)
    assert names(trace.kernels) == ["group_norm_statistics", "group_norm", "convolution"]


def test_lists_of_tensors_take_few_launches_and_casts_are_counted() -> None:
    many, others = ([torch.empty(3) for _ in range(130)] for _ in range(2))
    large = [torch.empty(65_536 * 1_000)]
    halves = [tensor.bfloat16() for tensor in many]
    with Trace() as trace:
        torch._foreach_lerp_(many, others, 0.5)
        torch._foreach_add_(large, 1.0)
        torch._foreach_copy_(halves, many)
        many[0].bfloat16()
        many[0].clone()
    assert [kernel.num_launches for kernel in trace.kernels] == [3, 4, 3, 1, 1]
    assert [kernel.bytes for kernel in trace.kernels[:3]] == [3 * 4 * 390, 8 * large[0].numel(), 6 * 390]
    assert [kernel.is_cast for kernel in trace.kernels] == [False, False, False, True, False]


def test_what_the_host_reads_is_told_and_what_it_computes_is_no_kernel() -> None:
    x, of_host = torch.empty(8), torch.empty(())
    with Trace() as trace:
        trace.stays_on_the_host(of_host)
        of_host.add_(1)
        of_host.item()
        assert trace.host_reads == []
        if x.sum() < 0:
            x.neg()
    assert trace.host_reads == ["_local_scalar_dense"]
    assert names(trace.kernels) == ["sum", "lt"]


def test_dropout_is_one_kernel_and_none_in_evaluation() -> None:
    x = torch.empty(8)
    with Trace() as trace:
        F.dropout(x, 0.5, training=False)
        F.dropout(x, 0.5, training=True)
    assert names(trace.kernels) == ["native_dropout"]
    assert trace.kernels[0].bytes == 8 * (4 + 4 + 1)
