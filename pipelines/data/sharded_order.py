"""An order of pictures in shards in which a task reads neighbours, so that a request brings many of them.

An epoch cuts the set into runs of neighbours, beginning at a random picture, and shuffles the runs. Every
four samples of the batch, or eight, have a reader: at the first step, readers stand at even distances in the
shuffled runs; at every step, each reads its next pictures. So a batch mixes pictures from all over the set,
and a task, which makes the same slots of the batch for some steps, reads on and on in a few places.

Everything is computed from the seed and the number of a sample, in memory that does not depend on the set.
"""

import numpy as np

from ctmsr.rng import permuted, sample_rng

_RUN_PICTURES = 256
"""Length of a run: few tasks come to its end."""
_MIN_RUNS = 32
"""Small sets are cut into shorter runs, or there would be nothing to shuffle."""
_WIDTH, _WIDTH_OF_LARGE, _LARGE = 4, 8, 64
"""Samples of a batch that are neighbours; more of them in large batches, which have many readers."""


def sharded(seed: int, samples: np.ndarray, n: int, batch: int) -> np.ndarray:
    """The pictures of some samples.

    Args:
        seed: Seed of the run.
        samples: int64 of shape (k,), from 0; sample // n is its epoch.
        n: Number of pictures, shards one after the other.
        batch: Samples of a step, over all workers.

    Returns:
        int64 of shape (k,), in 0..n-1. Over all samples of an epoch, each comes once.
    """
    epochs = samples // n
    places = _places(samples, epochs, n, batch)
    length = max(1, min(_RUN_PICTURES, n // _MIN_RUNS))
    num_runs = n // length
    runs, within = np.divmod(places, length)
    whole = runs < num_runs  # the rest of the set, shorter than a run, stays where it is: at the end
    runs[whole] = permuted(seed, epochs[whole], num_runs, runs[whole])
    distinct, which = np.unique(epochs, return_inverse=True)
    starts = [sample_rng(seed, epoch, "", "start").integers(n) for epoch in distinct.tolist()]
    return (np.array(starts, np.int64)[which] + runs * length + within) % n


def _places(samples: np.ndarray, epochs: np.ndarray, n: int, batch: int) -> np.ndarray:
    """Where in the shuffled runs of its epoch each sample is; over an epoch, each of 0..n-1 comes once."""
    steps, slots = np.divmod(samples, batch)
    first = -(-epochs * n // batch)  # step that is the first to be wholly in the epoch
    num_steps = np.maximum(0, (epochs + 1) * n // batch - first)
    num_readers = -(-batch // (_WIDTH if batch < _LARGE else _WIDTH_OF_LARGE))
    bounds = np.arange(num_readers + 1) * batch // num_readers  # slots of reader r: bounds[r]..bounds[r + 1]
    reader = np.searchsorted(bounds, slots, side="right") - 1
    width = bounds[reader + 1] - bounds[reader]
    read = num_steps * bounds[reader] + (steps - first) * width + slots - bounds[reader]
    # The steps that the epoch shares with its neighbours take what the readers leave, in order.
    is_before, is_after = steps < first, steps >= first + num_steps
    before = samples - epochs * n
    after = before - num_steps * batch
    left = num_steps * batch + np.where(is_before, before, after)
    return np.where(is_before | is_after, left, read)
