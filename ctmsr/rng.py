"""Random numbers as a pure function of their purpose: no global state, no dependence on worker or order.

Each stream is seeded by a hash of (run seed, epoch, sample, purpose), so that a sample gets the same crop,
degradation and noise on any number of workers and after a resume.
"""

import hashlib
import json
from typing import Literal

import numpy as np

OrderVersion = Literal[1, 2]
"""How an epoch is permuted: by `permutation` (1), as in early runs, or by `permuted` (2)."""
Order = Literal["global", "sharded"]
"""Whether all pictures are permuted one by one, or runs of neighbours."""


def sample_rng(seed: int, epoch: int, key: str, purpose: str) -> np.random.Generator:
    """Independent generator for one purpose on one sample of one epoch.

    Args:
        seed: Seed of the run.
        epoch: Pass over the data; a new epoch gives a new stream.
        key: Identity of the sample in its data set, for instance its object key.
        purpose: What the numbers are for ("crop", "degrade"), so that two uses never share numbers.

    Returns:
        A fresh PCG64 generator. Equal arguments give equal streams under one numpy version.
    """
    return np.random.default_rng(int.from_bytes(_digest(seed, epoch, key, purpose), "big"))


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order in which one epoch visits `n` samples: int64 of shape (n,), each of 0..n-1 once."""
    return sample_rng(seed, epoch, "", "permutation").permutation(n)


def permuted(seed: int, epochs: np.ndarray, n: int, positions: np.ndarray) -> np.ndarray:
    """The samples at some positions of some epochs' orders, in memory that does not grow with `n`.

    A keyed Feistel network permutes the next power of four; a result of `n` or more is permuted again until
    one falls below (cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        seed: Seed of the run.
        epochs: int64 of shape (k,): passes over the data; each has an order of its own.
        n: Number of samples, up to 2**62.
        positions: int64 of shape (k,), each from 0 to n - 1.

    Returns:
        int64 of shape (k,). Over all positions of an epoch, each of 0..n-1 comes once.
    """
    distinct, which = np.unique(epochs, return_inverse=True)
    drawn = [sample_rng(seed, epoch, "", "order").bytes(8 * _FEISTEL_ROUNDS) for epoch in distinct.tolist()]
    keys = np.frombuffer(b"".join(drawn), "<u8").reshape(-1, _FEISTEL_ROUNDS)[which]
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    found = _feistel(positions.astype(np.uint64), keys, half_bits)
    while len(outside := np.flatnonzero(found >= n)):
        found[outside] = _feistel(found[outside], keys[outside], half_bits)
    return found.astype(np.int64)


_FEISTEL_ROUNDS = 8


def _feistel(numbers: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """A bijection on the uint64 below 4**half_bits, by 8 keys for each; mixes with SplitMix64's finalizer."""
    width, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = numbers >> width, numbers & mask
    for key in keys.T:
        mixed = right ^ key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << width) | right


def sample_seed(seed: int, *parts: int | str) -> int:
    """Seed in [0, 2**63) for generators that take an integer, such as `torch.Generator.manual_seed`."""
    return int.from_bytes(_digest(seed, *parts)[:8], "big") >> 1


def _digest(*parts: int | str) -> bytes:
    # JSON keeps the parts apart and typed: ("a", "bc") and ("ab", "c"), or 1 and "1", must not collide.
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
