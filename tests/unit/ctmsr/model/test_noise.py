"""Noise: standard normal, without repeats, and a function of seed and position alone."""

import numpy as np
import pytest
import torch
from scipy import stats

from ctmsr.model.noise import NoiseVersion, normal, position_noise
from ctmsr.rng import sample_seed

CPU = torch.device("cpu")
SEEDS = [sample_seed(7, "ct", k) for k in range(4)]


def splitmix64(seed: int, num: int) -> list[int]:
    """The generator as it was published: a state that grows, and its mix."""
    mask, values = 2**64 - 1, []
    for _ in range(num):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(z ^ (z >> 31))
    return values


def test_it_is_box_and_muller_s_transform_of_splitmix64() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # as others publish them
    bits = np.array(splitmix64(splitmix64(SEEDS[0], 1)[0], 1000), np.uint64)
    u, v = ((bits >> np.uint64(32)) + 0.5) / 2**32, (bits & np.uint64(2**32 - 1)) / 2**32
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(2, 1000)
    np.testing.assert_allclose(normal(SEEDS[:1], (2, 1000), CPU)[0], expected, atol=2e-6)


def fields() -> list[np.ndarray]:
    return [
        normal(SEEDS, (3, 256, 256), CPU).numpy().reshape(12, 256, 256),
        position_noise(0, slice(0, 512), slice(0, 512)).numpy(),
    ]


@pytest.mark.parametrize("field", fields(), ids=["samples", "positions"])
def test_it_is_standard_normal(field: np.ndarray) -> None:
    n = field.size
    assert abs(field.mean()) < 4 / np.sqrt(n)
    assert abs(field.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.skew(field, axis=None)) < 4 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(field, axis=None)) < 4 * np.sqrt(24 / n)
    assert stats.kstest(field.ravel(), "norm").pvalue > 0.001
    assert 4.5 < np.abs(field).max() < 6.8


@pytest.mark.parametrize("field", fields(), ids=["samples", "positions"])
def test_neighbours_and_channels_are_independent(field: np.ndarray) -> None:
    for values in (field, field**2):
        values = (values - values.mean()) / values.std()
        pairs = [
            (values[:, :, 1:], values[:, :, :-1]),
            (values[:, :, 2:], values[:, :, :-2]),
            (values[:, 1:], values[:, :-1]),
            (values[:, 1:, 1:], values[:, :-1, :-1]),
            (values[1:], values[:-1]),
        ]
        assert all(abs((a * b).mean()) < 4.5 / np.sqrt(a.size) for a, b in pairs)


@pytest.mark.parametrize(
    "seeds", [range(64), SEEDS, [2**k for k in range(63)]], ids=["small", "hashed", "bits"]
)
def test_seeds_are_independent_of_each_other(seeds: list[int]) -> None:
    noise = normal(list(seeds), (2048,), CPU)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 5 / 2048**0.5
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5


def test_nothing_repeats() -> None:
    noise = normal(SEEDS, (3, 256, 256), CPU).double().flatten()
    # Of numbers with 24 random bits a few agree by chance; pairs of neighbours do not.
    pairs = noise[::2] * 1e9 + noise[1::2]
    assert len(pairs.unique()) == len(pairs)


@pytest.mark.parametrize("version", [1, 2])
def test_a_sample_s_noise_does_not_depend_on_its_batch(version: NoiseVersion) -> None:
    together = normal(SEEDS, (3, 10, 6), CPU, version)
    alone = torch.cat([normal([seed], (3, 10, 6), CPU, version) for seed in SEEDS])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("version", [1, 2])
def test_a_window_is_a_part_of_the_whole(version: NoiseVersion) -> None:
    whole = position_noise(5, slice(0, 600), slice(0, 700), version=version)
    for rows, columns in (((130, 520), (250, 260)), ((1, 2), (3, 4)), ((255, 600), (513, 700))):
        window = position_noise(5, slice(*rows), slice(*columns), version=version)
        assert torch.equal(window, whole[:, slice(*rows), slice(*columns)])
    assert abs(whole.mean()) < 0.005
    assert abs(whole.std() - 1) < 0.005


def test_version_1_is_torch_s_generator_sample_by_sample() -> None:
    expected = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(SEEDS[1]))
    assert torch.equal(normal(SEEDS, (3, 4, 6), CPU, 1)[1], expected)
    block = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(sample_seed(5, 0, 1)))
    assert torch.equal(position_noise(5, slice(0, 256), slice(256, 512), version=1), block)
