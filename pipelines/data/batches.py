"""Turns rows of the training stream into batches, minus empty rows and unreadable pictures."""

import numpy as np
import torch
from ray.util.queue import Queue

from ctmsr.errors import DataError
from ctmsr.training.step import Batch

from .stream import Rows


def make_batch(rows: Rows, *, global_batch_size: int, num_workers: int) -> Batch:
    """This worker's part of a batch, on the CPU.

    Empty rows and rows with a problem are dropped, which lowers `share`.
    If no row is left, a black picture of zero weight remains, as the worker still has to take part in the
    collective update.
    """
    good = np.flatnonzero((rows["problem"] == "") & (rows["sample"] >= 0))
    kept = good if len(good) else np.arange(1)
    return Batch(
        hr_u8=torch.tensor(rows["hr"][kept]),
        lq_u8=torch.tensor(rows["lq"][kept]),
        samples=rows["sample"][kept].tolist(),
        keys=rows["key"][kept].tolist(),
        share=len(good) * num_workers / global_batch_size,
    )


class StreamMonitor:
    """Counts what a worker reads: bytes, and pictures that became unreadable since they were listed.

    Every unreadable picture is reported once; too many of them end the run.
    """

    def __init__(self, max_unreadable: float, num_pictures: float, progress: Queue) -> None:
        """Tolerates a fraction `max_unreadable` of the `num_pictures` that this worker sees per epoch."""
        self._limit = max_unreadable
        self._num_pictures = num_pictures
        self._progress = progress
        self._keys: set[str] = set()
        self.file_bytes = 0
        """Read from storage for this worker's samples."""

    @property
    def unreadable_share(self) -> float:
        """Fraction of this worker's pictures that became unreadable; at data.max_unreadable the run ends."""
        return len(self._keys) / self._num_pictures

    def count(self, rows: Rows) -> None:
        """Counts the rows of a batch.

        Raises:
            DataError: More than data.max_unreadable of this worker's pictures are unreadable.
        """
        self.file_bytes += int(rows["file_bytes"].sum())
        for key, problem in zip(rows["key"].tolist(), rows["problem"].tolist(), strict=True):
            if not problem or key in self._keys:
                continue
            self._keys.add(key)
            if len(self._keys) > self._limit * self._num_pictures:
                raise DataError(
                    f"{problem} That makes {len(self._keys)} such pictures out of about "
                    f"{self._num_pictures:g}, more than data.max_unreadable ({self._limit:g}) allows. "
                    "Index the pictures again."
                )
            self._progress.put_nowait(f"warning: skipped (number {len(self._keys)}): {problem}")
