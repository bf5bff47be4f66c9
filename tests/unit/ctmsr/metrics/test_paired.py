"""An interval over pictures: its numbers by hand and by scipy, and how often it holds the truth."""

import numpy as np
import pytest
from scipy import stats

from ctmsr.metrics.paired import Interval, paired_interval


def test_the_interval_by_hand() -> None:
    """s = 1.5811, t of 4 degrees of freedom at 97.5 % = 2.7764: 2.7764 · 1.5811 / √5 = 1.9632."""
    found = paired_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found is not None
    assert (found.mean, found.num_pictures) == (3.0, 5)
    assert found.half_width == pytest.approx(1.9632, abs=1e-4)
    assert not found.holds_zero


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal(0.4, 0.1, 40), draw.normal(0.42, 0.1, 40)
    found = paired_interval((ours - theirs).tolist())
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)


def test_four_pictures_give_no_interval() -> None:
    assert paired_interval([-0.1] * 4) is None
    assert paired_interval([]) is None


def test_pictures_that_all_agree_give_a_point() -> None:
    assert paired_interval([0.0] * 5) == Interval(0.0, 0.0, 5)
    assert Interval(0.0, 0.0, 5).holds_zero
    assert not Interval(-0.1, 0.0, 5).holds_zero
    assert Interval(-0.1, 0.1, 5).holds_zero
    assert Interval(float("nan"), float("nan"), 5).holds_zero


def test_pairing_is_what_tells_models_apart() -> None:
    """Pictures differ by more than models do, and in both alike."""
    draw = np.random.default_rng(1)
    pictures = draw.normal(0.4, 0.1, 20)
    ours, theirs = pictures - 0.01 + draw.normal(0, 0.005, 20), pictures + draw.normal(0, 0.005, 20)
    paired = paired_interval((ours - theirs).tolist())
    shuffled = paired_interval((ours - draw.permutation(theirs)).tolist())
    assert paired is not None
    assert shuffled is not None
    assert not paired.holds_zero
    assert shuffled.holds_zero


@pytest.mark.parametrize("num_models", [1, 12])
def test_the_best_of_models_that_are_alike_is_rarely_called_better(num_models: int) -> None:
    """One search in twenty at most, however many trials there were to pick from."""
    draw, wrong, num_searches = np.random.default_rng(2), 0, 1000
    for _ in range(num_searches):
        differences = draw.normal(0, 0.05, (num_models, 20))
        best = differences[differences.mean(axis=1).argmin()]
        found = paired_interval(best.tolist(), num_compared=num_models)
        assert found is not None
        wrong += not found.holds_zero
    assert 0.01 < wrong / num_searches < 0.065
