"""Streams depend on all of their arguments and on nothing else."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from ctmsr.rng import permutation, permuted, sample_rng, sample_seed


def draws(seed: int, epoch: int, key: str, purpose: str) -> list[int]:
    return sample_rng(seed, epoch, key, purpose).integers(2**63, size=4).tolist()


def test_equal_arguments_give_equal_streams() -> None:
    assert draws(7, 3, "a.png", "crop") == draws(7, 3, "a.png", "crop")


@pytest.mark.parametrize(
    "other",
    [(8, 3, "a.png", "crop"), (7, 4, "a.png", "crop"), (7, 3, "b.png", "crop"), (7, 3, "a.png", "degrade")],
)
def test_every_argument_changes_the_stream(other: tuple[int, int, str, str]) -> None:
    assert draws(*other) != draws(7, 3, "a.png", "crop")


def test_arguments_do_not_run_together() -> None:
    assert draws(0, 0, "ab", "c") != draws(0, 0, "a", "bc")
    assert draws(1, 23, "", "") != draws(12, 3, "", "")
    assert sample_seed(0, 1) != sample_seed(0, "1")


def test_streams_do_not_depend_on_the_process() -> None:
    """Python's own hash() of a string is salted per process; ours must not be."""
    code = "from ctmsr.rng import sample_seed; print(sample_seed(5, 'photo', 2))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == sample_seed(5, "photo", 2)


def test_seeds_are_pinned() -> None:
    """A change here changes every run: raise the checkpoint format version if it is meant."""
    assert sample_seed(5, "photo", 2) == 7245824327973245297


def test_sample_seeds_fit_63_bits_and_fill_them() -> None:
    seeds = [sample_seed(0, i) for i in range(1000)]
    assert min(seeds) >= 0
    assert 2**62 < max(seeds) < 2**63
    assert len(set(seeds)) == 1000


def test_permutation_visits_each_sample_once_in_a_new_order_each_epoch() -> None:
    first, again, second = permutation(1, 0, 500), permutation(1, 0, 500), permutation(1, 1, 500)
    np.testing.assert_array_equal(np.sort(first), np.arange(500))
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.9


def order(seed: int, n: int) -> np.ndarray:
    return permuted(seed, np.zeros(n, int), n, np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 255, 256, 257, 65_537])
def test_a_computed_order_visits_each_sample_once_in_a_new_order_each_epoch(n: int) -> None:
    both = permuted(1, np.repeat([0, 1], n), n, np.tile(np.arange(n), 2))
    first, second = both[:n], both[n:]
    np.testing.assert_array_equal(np.sort(first), np.arange(n))
    np.testing.assert_array_equal(np.sort(second), np.arange(n))
    if n > 100:
        assert (first != second).mean() > 0.9


def test_any_part_of_a_computed_order_is_that_part_of_the_whole() -> None:
    positions = np.array([999, 0, 5, 5])
    found = permuted(3, np.array([0, 0, 0, 1]), 1000, positions)
    np.testing.assert_array_equal(found[:3], order(3, 1000)[positions[:3]])
    assert found[3] != found[2]


def test_a_computed_order_is_pinned() -> None:
    """A change here changes the pictures of every run that goes on: add a version of the order instead."""
    assert permuted(5, np.ones(3, int), 10**12, np.arange(3)).tolist() == [
        499147049349,
        399084381590,
        876464489361,
    ]


def test_all_orders_of_four_samples_are_equally_likely() -> None:
    orders, counts = np.unique([order(seed, 4) for seed in range(2400)], axis=0, return_counts=True)
    assert len(orders) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("n", [1000, 4096, 10_007])
def test_a_computed_order_looks_as_random_as_a_drawn_one(n: int) -> None:
    """Statistics over twenty seeds, against those of numpy's permutations."""
    ours = [order(seed, n) for seed in range(20)]
    drawn = [np.random.default_rng(seed).permutation(n) for seed in range(20)]
    for statistic in (neighbours_correlation, lag_correlation, num_runs, place_correlation, parity_of_steps):
        a, b = ([statistic(one) for one in orders] for orders in (ours, drawn))
        assert scipy.stats.ks_2samp(a, b).pvalue > 1e-3, statistic.__name__
    # The steps between neighbours have the distribution that they have in a drawn order.
    steps = [np.concatenate([np.diff(one) for one in orders]) for orders in (ours, drawn)]
    assert scipy.stats.ks_2samp(*steps).pvalue > 1e-3


def neighbours_correlation(one: np.ndarray) -> float:
    return float(np.corrcoef(one[1:], one[:-1])[0, 1])


def lag_correlation(one: np.ndarray) -> float:
    return float(np.corrcoef(one[32:], one[:-32])[0, 1])


def place_correlation(one: np.ndarray) -> float:
    return float(np.corrcoef(one, np.arange(len(one)))[0, 1])


def num_runs(one: np.ndarray) -> float:
    """Ascending and descending runs."""
    return float(np.count_nonzero(np.diff(np.sign(np.diff(one)))))


def parity_of_steps(one: np.ndarray) -> float:
    return float((np.diff(one) % 2).mean())
