"""Rows of the training stream to batches: on the device, without empty rows and unreadable pictures."""

import numpy as np
import torch
from ray.util.queue import Queue

from ctmsr.errors import DataError
from ctmsr.train_step import Batch

from .stream import Rows


def make_batch(rows: Rows, device: torch.device, *, global_batch_size: int, num_workers: int) -> Batch:
    """This worker's part of a batch. Empty rows and rows with a problem are left out and lower `share`.

    Where none is left, a black picture stays in, which counts nothing: the worker must take part in the
    update of the others.
    """
    good = np.flatnonzero((rows["problem"] == "") & (rows["sample"] >= 0))
    kept = good if len(good) else np.arange(1)
    return Batch(
        hr_u8=torch.tensor(rows["hr"][kept]).to(device, non_blocking=True),
        lq_u8=torch.tensor(rows["lq"][kept]).to(device, non_blocking=True),
        samples=rows["sample"][kept].tolist(),
        keys=rows["key"][kept].tolist(),
        share=len(good) * num_workers / global_batch_size,
    )


class Intake:
    """What a worker was given: bytes read, and pictures that became unreadable since they were listed.

    Each of these is told once, and too many end the run.
    """

    def __init__(self, max_unreadable: float, num_own: float, progress: Queue) -> None:
        """`num_own` is how many pictures of an epoch this worker sees; `max_unreadable` the share allowed."""
        self._limit = max_unreadable
        self._num_own = num_own
        self._progress = progress
        self._keys: set[str] = set()
        self.file_bytes = 0
        """Read from storage for this worker's samples."""

    def count(self, rows: Rows) -> None:
        """Takes note of the rows of a batch.

        Raises:
            DataError: More than data.max_unreadable of this worker's pictures have one.
        """
        self.file_bytes += int(rows["file_bytes"].sum())
        for key, problem in zip(rows["key"].tolist(), rows["problem"].tolist(), strict=True):
            if not problem or key in self._keys:
                continue
            self._keys.add(key)
            if len(self._keys) > self._limit * self._num_own:
                raise DataError(
                    f"{problem} That makes {len(self._keys)} such pictures among about {self._num_own:g}, "
                    f"more than data.max_unreadable ({self._limit:g}) allows. Index the pictures anew."
                )
            self._progress.put_nowait(f"warning: left out (number {len(self._keys)}): {problem}")
