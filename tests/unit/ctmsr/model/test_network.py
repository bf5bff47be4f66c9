"""The network is the published one, entry by entry and number by number, and f(x, 0, y) = x."""

import json
import re
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctmsr.errors import ConfigError
from ctmsr.model.network import ConsistencyModel, NetworkConfig, bf16_copy
from tests.support.fixture_inputs import FULL, TINY, fill_weights, tensor
from tests.support.repository import FIXTURES
from tests.support.tiny import NETWORK, filled_model


def replaced(**changes: Any) -> NetworkConfig:
    return NetworkConfig(**{**vars(NETWORK), **changes})


@pytest.fixture(scope="module")
def published() -> ConsistencyModel:
    with torch.device("meta"):
        return ConsistencyModel(FULL)


def test_state_dict_has_the_published_layout(published: ConsistencyModel) -> None:
    expected = json.loads((FIXTURES / "published_layout.json").read_text())
    found = {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in published.state_dict().items()
    }
    assert len(found) == 942
    assert found == expected
    assert list(found) == list(expected)


def test_published_size(published: ConsistencyModel) -> None:
    assert round(sum(p.numel() for p in published.parameters()) / 1e6, 1) == 171.5


CASES = {
    "sigma1.0000": ("lq", "eps", 64, 1.0),
    "sigma0.3333": ("lq", "eps", 64, 1 / 3),
    "64x128": ("lq2", "eps2", 128, 1.0),
}


def assert_matches_the_reference(model: ConsistencyModel, size: str) -> None:
    fill_weights(model.eval())
    fixture = np.load(FIXTURES / "forward_fixture.npz")
    for case, (lq_name, noise_name, width, sigma) in CASES.items():
        lq = tensor(lq_name, (1, 3, 64, width)).clamp(-1, 1) / 2
        lq_up = F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False)
        x = lq_up + sigma * tensor(noise_name, tuple(lq_up.shape))
        with torch.no_grad():
            found = model(x, torch.tensor([sigma]), lq)[0, :, ::16, ::16].numpy()
        expected = fixture[f"{size}_{case}"]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), case


def test_tiny_outputs_are_those_of_the_published_network() -> None:
    assert_matches_the_reference(ConsistencyModel(TINY), "tiny")


@pytest.mark.slow
def test_full_outputs_are_those_of_the_published_network() -> None:
    assert_matches_the_reference(ConsistencyModel(FULL), "full")


def test_boundary_condition_holds_exactly() -> None:
    x, lq = tensor("x", (2, 3, 64, 64)), tensor("lq", (2, 3, 16, 16))
    assert torch.equal(filled_model()(x, torch.tensor(0.0), lq), x)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_output_is_scale_times_the_lq(scale: Literal[2, 3, 4], size: tuple[int, int]) -> None:
    model = filled_model(replaced(scale=scale))
    x = tensor("x", (2, 3, scale * size[0], scale * size[1]))
    sr = model(x, torch.tensor([0.5, 1.0]), tensor("lq", (2, 3, *size)))
    assert sr.shape == x.shape
    assert torch.isfinite(sr).all()


def test_images_of_a_batch_do_not_mix() -> None:
    model = filled_model()
    x, lq, sigma = tensor("x", (2, 3, 64, 64)), tensor("lq", (2, 3, 16, 16)), torch.tensor([0.3, 1.0])
    together = model(x, sigma, lq)
    for i in range(2):
        alone = model(x[i : i + 1], sigma[i], lq[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_shapes_the_output() -> None:
    model = filled_model()
    model(
        tensor("x", (1, 3, 64, 64)), torch.tensor(1.0), tensor("lq", (1, 3, 16, 16))
    ).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_dropout_acts_in_training_alone() -> None:
    model = filled_model(replaced(dropout=0.5))
    arguments = tensor("x", (1, 3, 64, 64)), torch.tensor(1.0), tensor("lq", (1, 3, 16, 16))
    assert not torch.equal(model(*arguments), model(*arguments))
    model.eval()
    assert torch.equal(model(*arguments), model(*arguments))


class Casts(TorchDispatchMode):
    """Shapes of the tensors that are cast while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_a_bf16_copy_casts_what_goes_in_and_out_and_nothing_between() -> None:
    model = bf16_copy(filled_model())
    x, lq = tensor("x", (2, 3, 64, 64)), tensor("lq", (2, 3, 16, 16))
    with Casts() as casts:
        sr = model(x, torch.tensor([0.3, 1.0]), lq)
        sr.sum().backward()
    assert sr.dtype == torch.float32
    # Inside attention, (windows, 2 heads, 16 tokens, ...), a CPU's kernel casts by itself.
    outside = [shape for shape in casts.shapes if len(shape) < 4 or shape[1] != NETWORK.num_heads]
    assert outside == [(2, 32), (2, 51, 16, 16), (2, 3, 64, 64), (2, 3, 64, 64)]


def test_a_fresh_network_starts_with_blocks_that_add_next_to_nothing() -> None:
    entries = ConsistencyModel(NETWORK).state_dict()
    last = [value for name, value in entries.items() if name.endswith(("conv1.weight", "aux_conv.weight"))]
    assert len(last) == 11  # ten blocks and the head
    assert all(0 < value.abs().max() < 1e-4 for value in last)
    assert all(not value.any() for name, value in entries.items() if name.endswith("conv0.bias"))


def test_one_level_is_a_network_too() -> None:
    config = replaced(channel_mult=(1,), lq_size=8)
    assert (config.multiple, config.hr_size) == (4, 32)
    x = tensor("x", (1, 3, 32, 32))
    assert filled_model(config)(x, torch.tensor(1.0), tensor("lq", (1, 3, 8, 8))).shape == x.shape


def norms(config: NetworkConfig) -> set[tuple[int, int]]:
    """(channels, groups) of the norms in the residual blocks and the head."""
    with torch.device("meta"):
        modules = ConsistencyModel(config).modules()
    return {(m.num_channels, m.num_groups) for m in modules if isinstance(m, nn.GroupNorm) and m.eps == 1e-6}


def test_norms_have_the_published_groups_wherever_those_divide_the_channels() -> None:
    for config in (FULL, TINY, NETWORK, replaced(model_channels=64, channel_mult=(1, 2, 2), lq_size=32)):
        assert {groups for channels, groups in norms(config) if groups != min(32, channels // 4)} == set()


@pytest.mark.parametrize("width", [16, 48, 80])
def test_widths_in_steps_of_16_are_networks_too(width: int) -> None:
    config = replaced(model_channels=width)
    assert all(channels % groups == 0 and groups >= 4 for channels, groups in norms(config))
    x = tensor("x", (1, 3, 64, 64))
    sr = filled_model(config)(x, torch.tensor(1.0), tensor("lq", (1, 3, 16, 16)))
    assert sr.shape == x.shape
    assert torch.isfinite(sr).all()


def test_published_sides_must_be_multiples_of_64() -> None:
    assert (FULL.multiple, FULL.hr_size) == (64, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"network.{name} must be at least 1, got 0.")
            for name in ("lq_size", "model_channels", "num_blocks", "embed_dim", "num_heads", "window_size")
        ),
        ({"channel_mult": ()}, "network.channel_mult must be whole numbers of at least 1, got ()."),
        ({"channel_mult": (1, 0)}, "network.channel_mult must be whole numbers of at least 1, got (1, 0)."),
        ({"model_channels": 40}, "network.model_channels must be a multiple of 16 (norm groups), got 40."),
        ({"embed_dim": 48}, "network.embed_dim must be a multiple of 32 (its norms have 32 groups), got 48."),
        ({"num_heads": 3}, "network.num_heads must divide embed_dim (32), got 3."),
        ({"dropout": 1.0}, "network.dropout must be in [0, 1), got 1.0."),
        ({"dropout": -0.1}, "network.dropout must be in [0, 1), got -0.1."),
        ({"lq_size": 20}, "network.lq_size must be a multiple of 8 (window_size x 2^(levels - 1)), got 20."),
        ({"channel_mult": (1, 1, 1)}, "network.lq_size must be a multiple of 16"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replaced(**changes)
