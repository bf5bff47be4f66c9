"""Near-duplicates: which pictures look like a better one, by 64-bit hashes a few bits apart."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

MAX_DISTANCE = 6
"""Bits. Further apart there would be hundreds of tables to sort, and pictures that are not alike."""
_AGREEING = 3


def keepers(hashes: np.ndarray, distance: int) -> np.ndarray:
    """For each picture the one that is kept instead of it, which is itself if it is kept.

    The pictures are gone through from best to worst, and each is kept unless it is near one that is kept
    already. So nothing is given up for a picture more than `distance` bits away, and nothing is kept twice.
    Takes some hundred bytes a picture, however many are alike.

    Args:
        hashes: uint64 of shape (n,), best picture first.
        distance: Bits that may differ, from 0 to `MAX_DISTANCE`.

    Returns:
        int64 of shape (n,): positions in `hashes`.
    """
    # Equal hashes first: a million of them would make a million times a million pairs.
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    by_rank = np.argsort(first)
    place = np.empty_like(by_rank)
    place[by_rank] = np.arange(len(by_rank))
    kept = _keepers_of_distinct(distinct[by_rank], distance)
    return first[by_rank][kept][place[which]]


def _keepers_of_distinct(hashes: np.ndarray, distance: int) -> np.ndarray:
    kept = np.arange(len(hashes))
    is_near = np.zeros(len(hashes), bool)
    for better, worse in _near_pairs(hashes, distance):
        is_near[better] = is_near[worse] = True
    open_ = np.flatnonzero(is_near)  # those without neighbours are kept
    while len(open_):
        some, numbers = hashes[open_], np.arange(len(open_))
        best_rival, owner = numbers.copy(), np.full(len(open_), len(open_))
        for better, worse in _near_pairs(some, distance):
            np.minimum.at(best_rival, worse, better)
        is_kept = best_rival == numbers
        for better, worse in _near_pairs(some, distance):
            np.minimum.at(owner, worse[is_kept[better]], better[is_kept[better]])
        is_given_up = owner < len(open_)
        kept[open_[is_given_up]] = open_[owner[is_given_up]]
        open_ = open_[~is_kept & ~is_given_up]
    return kept


def _near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs at most `distance` bits apart, as arrays of lower and of higher positions; some come twice.

    Of `distance` + 3 blocks of bits, at least three agree in such a pair. So for every choice of three blocks
    (Manku et al., Detecting Near-Duplicates for Web Crawling, 2007), pictures are sorted by them, and each is
    compared with those after it while the three agree.

    Args:
        hashes: Distinct.
        distance: As in `keepers`.
    """
    if not distance:
        return
    num_blocks = distance + _AGREEING
    # A block has bits from everywhere: those next to each other in a picture often agree.
    masks = [sum(1 << bit for bit in range(first, 64, num_blocks)) for first in range(num_blocks)]
    for chosen in combinations(masks, _AGREEING):
        key = hashes & np.uint64(sum(chosen))
        order = np.argsort(key, kind="stable")
        key, sorted_ = key[order], hashes[order]
        at, step = np.arange(len(key)), 0
        while True:
            step += 1
            at = at[at + step < len(key)]
            at = at[key[at] == key[at + step]]
            if not len(at):
                break
            found = at[np.bitwise_count(sorted_[at] ^ sorted_[at + step]) <= distance]
            one, other = order[found], order[found + step]
            yield np.minimum(one, other), np.maximum(one, other)
