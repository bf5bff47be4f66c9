"""Random numbers as a pure function of their purpose: no global state, no dependence on worker or order.

Each stream is seeded by a hash of (run seed, epoch, sample, purpose), so that a sample gets the same crop,
degradation and noise on any number of workers and after a resume.
"""

import hashlib
import json

import numpy as np


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


def sample_seed(seed: int, *parts: int | str) -> int:
    """Seed in [0, 2**63) for generators that take an integer, such as `torch.Generator.manual_seed`."""
    return int.from_bytes(_digest(seed, *parts)[:8], "big") >> 1


def _digest(*parts: int | str) -> bytes:
    # JSON keeps the parts apart and typed: ("a", "bc") and ("ab", "c"), or 1 and "1", must not collide.
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
