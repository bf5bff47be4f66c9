"""Training batches on one machine without Ray: photographs in memory, forked workers, a pool of pairs.

Photographs are decoded once. Forked processes fill a pool in shared memory: each draws a crop, flips or turns
it, degrades it, and puts the pair into the next of its places, round after round. The trainer draws random
places and never waits; a pair that is drawn twice before it is replaced appears in another of the eight
symmetries of the square (flips and quarter turns), under which JPEG's blocks and the resizes are invariant.

A pair is a function of the seed, its place and its round, on any number of processes: a pool that is filled
only once, with `renew=False`, is a data set that all arms of a comparison share.
"""

import mmap
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ctmsr.degradation.config import DegradationConfig
from ctmsr.degradation.recipe import degrade
from ctmsr.errors import DataError
from ctmsr.image import decode, random_crop
from ctmsr.training.step import Batch

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SYMMETRIES = 8


def read_photos(folder: Path, limit: int | None = None) -> list[np.ndarray]:
    """All pictures of a folder, ordered by name, uint8 (height, width, 3) each.

    Raises:
        DataError: There are none.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder} contains no picture ({', '.join(sorted(SUFFIXES))}). Name another folder.")
    return [decode(path.read_bytes(), name=str(path)) for path in paths[:limit]]


class PairPool:
    """`capacity` pairs in shared memory, and the processes that fill and renew them."""

    def __init__(
        self,
        photos: Sequence[np.ndarray],
        *,
        hr_size: int,
        scale: int,
        degradation: DegradationConfig,
        capacity: int,
        num_processes: int,
        seed: int = 0,
        renew: bool = True,
    ) -> None:
        """Forks the processes: call it before anything touches a GPU.

        Args:
            photos: uint8 pictures, drawn in proportion to their areas.
            hr_size: Side of the HR crops in pixels.
            scale: HR/LQ ratio.
            degradation: The recipe.
            capacity: Places of the pool, at least `num_processes`.
            num_processes: Processes that degrade; leave a core for the trainer.
            seed: Seed of crops and degradation.
            renew: Whether to keep replacing pairs while the pool is open, or make each only once.
        """
        self._photos, self._scale, self._degradation, self._seed = photos, scale, degradation, seed
        self._renew = renew
        lq_size = hr_size // scale
        self.hr_u8 = _shared((capacity, hr_size, hr_size, 3), np.uint8)
        self.lq_u8 = _shared((capacity, lq_size, lq_size, 3), np.uint8)
        # Twice the round of the pair, plus one while it is being written.
        self._versions = _shared((capacity,), np.int64)
        areas = np.array([photo.shape[0] * photo.shape[1] for photo in photos], np.float64)
        self._odds = areas / areas.sum()
        context = multiprocessing.get_context("fork")
        self._stop = context.Event()
        self._processes = [
            context.Process(target=self._fill, args=(first, num_processes), daemon=True)
            for first in range(num_processes)
        ]
        for process in self._processes:
            process.start()

    @property
    def num_made(self) -> int:
        """Pairs made so far, in all rounds."""
        return int((self._versions // 2).sum())

    def wait(self, num_ready: int | None = None) -> None:
        """Waits until that many places, by default all, hold a pair.

        Raises:
            DataError: A process ended first.
        """
        wanted = len(self._versions) if num_ready is None else num_ready
        while np.count_nonzero(self._versions >= 2) < wanted:
            if any(process.exitcode for process in self._processes):
                raise DataError("a process that degrades pictures ended; its error is printed above.")
            time.sleep(0.01)

    def close(self) -> None:
        """Ends the processes."""
        self._stop.set()
        for process in self._processes:
            process.join()

    def read(self, places: np.ndarray, hr_out: np.ndarray, lq_out: np.ndarray) -> None:
        """Copies the pairs at `places` into the arrays; one replaced in the meantime is copied again."""
        rows = np.arange(len(places))
        while len(rows):
            before = self._versions[places[rows]]
            hr_out[rows] = self.hr_u8[places[rows]]
            lq_out[rows] = self.lq_u8[places[rows]]
            rows = rows[(before % 2 == 1) | (self._versions[places[rows]] != before)]

    def ready(self) -> np.ndarray:
        """Places that hold a pair."""
        return np.flatnonzero(self._versions >= 2)

    def _fill(self, first: int, step: int) -> None:
        """Body of a process: fills its places in turn, until it is stopped or its parent is gone."""
        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        parent = os.getppid()
        for number in count() if self._renew else range(1):
            for place in range(first, len(self._versions), step):
                if self._stop.is_set() or os.getppid() != parent:
                    return
                hr_u8, lq_u8 = self._pair(place, number)
                self._versions[place] += 1
                self.hr_u8[place], self.lq_u8[place] = hr_u8, lq_u8
                self._versions[place] += 1

    def _pair(self, place: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A crop and its degraded version: a function of seed, place and round."""
        rng = np.random.default_rng([self._seed, place, number])
        photo = self._photos[rng.choice(len(self._photos), p=self._odds)]
        hr_u8 = random_crop(photo, self.hr_u8.shape[1], rng, name="a photograph")
        hr_u8 = np.rot90(hr_u8, int(rng.integers(4)))
        hr_u8 = np.ascontiguousarray(hr_u8[:, ::-1] if rng.integers(2) else hr_u8)
        return hr_u8, degrade(hr_u8, scale=self._scale, config=self._degradation, rng=rng)


class LocalFeed:
    """Endless batches from a pool, on the device; all copies are from pinned memory."""

    def __init__(self, pool: PairPool, *, batch_size: int, device: torch.device, seed: int = 0) -> None:
        """`seed` determines the order; on the same frozen pool it gives the same batches."""
        self._pool, self._device, self._size, self._seed = pool, device, batch_size, seed
        pin = device.type == "cuda"
        # While the device still copies from one pair of buffers, the other is filled.
        self._buffers = [
            tuple(
                torch.empty((batch_size, *array.shape[1:]), dtype=torch.uint8, pin_memory=pin)
                for array in (pool.hr_u8, pool.lq_u8)
            )
            for _ in range(2)
        ]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def __iter__(self) -> Iterator[Batch]:
        for step in range(10**12):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """The batch for an optimizer step."""
        rng = np.random.default_rng([self._seed, step])
        places = rng.choice(self._pool.ready(), self._size)
        hr_u8, lq_u8 = self._on_device(places, step % 2)
        symmetries = rng.permutation(SYMMETRIES)
        samples = list(range(step * self._size, (step + 1) * self._size))
        return Batch(
            hr_u8=turned(hr_u8, symmetries),
            lq_u8=turned(lq_u8, symmetries),
            samples=samples,
            keys=[f"place {place}" for place in places],
        )

    def _on_device(self, places: np.ndarray, turn: int) -> tuple[Tensor, Tensor]:
        hr_u8, lq_u8 = self._buffers[turn]
        if (copied := self._copied[turn]) is not None:
            copied.synchronize()
        self._pool.read(places, hr_u8.numpy(), lq_u8.numpy())
        if self._device.type != "cuda":
            return hr_u8.clone(), lq_u8.clone()
        on_device = [pixels.to(self._device, non_blocking=True) for pixels in (hr_u8, lq_u8)]
        copied = self._copied[turn] = torch.cuda.Event()
        copied.record()
        return on_device[0], on_device[1]


def turned(images: Tensor, symmetries: Sequence[int] | np.ndarray) -> Tensor:
    """Applies one of the square's symmetries to each square NHWC image, the same to an HR image and its LQ.

    The batch is split into as many groups as there are symmetries, so that the number of operations does not
    depend on its size.

    Args:
        images: (N, side, side, C).
        symmetries: For each group: quarter turns, plus 4 for a flip before them.

    Returns:
        A new tensor of the same shape.
    """
    groups = [
        torch.rot90(group.flip(2) if symmetry >= 4 else group, int(symmetry) % 4, (1, 2))
        for group, symmetry in zip(images.chunk(len(symmetries)), symmetries, strict=False)
    ]
    return torch.cat(groups).contiguous()


def _shared(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that forked processes share, outside /dev/shm, whose size a container may limit."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
