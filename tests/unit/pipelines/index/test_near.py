"""Near-duplicates: what is kept is what going through all pairs would keep, whatever the hashes."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.index.near import MAX_DISTANCE, keepers


def one_by_one(hashes: list[int], distance: int) -> list[int]:
    """The positions that are kept, found by comparing every picture with all that are kept before it."""
    kept: list[int] = []
    for number, hash_ in enumerate(hashes):
        if all((hash_ ^ hashes[other]).bit_count() > distance for other in kept):
            kept.append(number)
    return kept


@st.composite
def alike(draw: st.DrawFn) -> list[int]:
    """Hashes around a few centres, each some bits away from one before it."""
    hashes = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    for _ in range(draw(st.integers(0, 40))):
        hash_ = draw(st.sampled_from(hashes))
        for bit in draw(st.lists(st.integers(0, 63), max_size=MAX_DISTANCE + 1)):
            hash_ ^= 1 << bit
        hashes.append(hash_)
    return draw(st.permutations(hashes))


@settings(max_examples=150, deadline=None)
@given(hashes=alike(), distance=st.integers(0, MAX_DISTANCE))
def test_kept_as_if_compared_one_by_one(hashes: list[int], distance: int) -> None:
    keeper = keepers(np.array(hashes, np.uint64), distance).tolist()
    assert [number for number, kept in enumerate(keeper) if kept == number] == one_by_one(hashes, distance)
    for number, kept in enumerate(keeper):
        assert keeper[kept] == kept
        assert kept <= number
        assert (hashes[number] ^ hashes[kept]).bit_count() <= distance


@pytest.mark.parametrize("distance", [0, 3])
def test_many_and_many_of_the_same(distance: int) -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 200_000, np.uint64)
    hashes[50_000:150_000] = hashes[7]
    hashes[150_000:150_100] = hashes[:100] ^ np.uint64(0b1001)
    started = time.monotonic()
    keeper = keepers(hashes, distance)
    assert time.monotonic() - started < 20
    assert set(keeper[50_000:150_000].tolist()) == {7}
    others = keeper[150_000:150_100]
    assert others.tolist() == (list(range(100)) if distance else list(range(150_000, 150_100)))
