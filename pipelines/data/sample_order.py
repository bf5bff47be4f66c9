"""The samples of a training stream, their order and their blocks, as a function of the seed and of counts."""

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import DataContext, Datasource, RandomSeedConfig, ReadTask
from ray.data.block import BlockMetadata

from ctmsr.rng import Order, OrderVersion, permutation, permuted

from .pictures import Pictures
from .sharded_order import sharded

_MIN_BLOCK_ROWS = 160
"""Ray Data's overhead is per block: 40 rows gave 1.6 to 2 times the images/s of 20, and 160 gave 1.09 times
those of 80."""
_MIN_SHARDED_ROWS = 224
"""As many as keep a task at a request for every twenty samples, however few workers there are."""
_ROUND_BLOCKS = 32
"""Blocks per worker in one execution of the stream. Ray Data may run ahead by all of them, and plans them, at
3 ms each, before the first one runs."""
_ROW_BYTES = 100
"""Estimate, for Ray Data's budget of memory: two numbers and a key."""
NO_SAMPLE = -1


def rows_per_worker(global_batch_size: int, num_workers: int) -> int:
    """Rows of the training stream that each worker consumes per step."""
    return -(-global_batch_size // num_workers)


class SampleOrder(Datasource):
    """Blocks of samples; block j holds the rows of worker j % num_workers, step by step.

    Every execution of the dataset yields the next round of blocks. Ray Train's shards cannot switch to a new
    dataset each round, and Ray Data would plan the blocks of all rounds up front.

    A row carries the key of its picture. The keys of an index are looked up by the tasks: this object holds
    numbers only, and its memory does not depend on how many pictures there are.

    The order of the pictures is global or `sharded`. Version 2 of the global one computes the picture of a
    sample; version 1, for runs that began with it, draws a permutation of all pictures.
    """

    def __init__(
        self,
        pictures: Pictures,
        seed: int,
        skip: int,
        total: int,
        global_batch_size: int,
        num_workers: int,
        version: OrderVersion = 2,
        crops_per_picture: int = 1,
        order: Order = "global",
    ) -> None:
        super().__init__()
        self._pictures, self._seed, self._version, self._order = pictures, seed, version, order
        self._skip, self._crops_per_picture = skip, crops_per_picture
        self._num_steps = max(0, total - skip) // global_batch_size
        self._global_batch_size = global_batch_size
        self._num_workers = num_workers
        min_rows = _MIN_SHARDED_ROWS if order == "sharded" else _MIN_BLOCK_ROWS
        self._steps_per_block = -(-min_rows * num_workers // global_batch_size)
        self._steps_per_round = self._steps_per_block * _ROUND_BLOCKS

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        first = self._steps_per_round * _num_executions(data_context)
        stop = min(first + self._steps_per_round, self._num_steps)
        tasks = []
        for step in range(first, stop, self._steps_per_block):
            steps = np.arange(step, min(step + self._steps_per_block, stop))
            samples = (
                self._skip + steps[:, None] * self._global_batch_size + np.arange(self._global_batch_size)
            )
            num_rows = self._num_workers * rows_per_worker(self._global_batch_size, self._num_workers)
            samples = np.pad(
                samples, ((0, 0), (0, num_rows - self._global_batch_size)), constant_values=NO_SAMPLE
            )
            by_worker = samples.reshape(len(steps), self._num_workers, -1)  # axes: step, worker, row
            tasks += [self._task(by_worker[:, w].ravel()) for w in range(self._num_workers)]
        return tasks

    def _task(self, samples: np.ndarray) -> ReadTask:
        num_pictures = len(self._pictures)
        visits = samples // self._crops_per_picture
        epochs, positions = np.divmod(visits, num_pictures)
        picture = np.zeros_like(samples)  # empty rows keep picture 0
        real = samples != NO_SAMPLE
        if self._order == "sharded":
            size = max(1, self._global_batch_size // self._crops_per_picture)
            picture[real] = sharded(self._seed, visits[real], num_pictures, size)
        else:
            visited = _visited_v1 if self._version == 1 else permuted
            picture[real] = visited(self._seed, epochs[real], num_pictures, positions[real])
        take = self._pictures.keys.taker(picture)
        metadata = BlockMetadata(
            num_rows=len(samples), size_bytes=_ROW_BYTES * len(samples), exec_stats=None, input_files=None
        )
        return ReadTask(lambda: [sample_table(samples, epochs, take())], metadata)


def _num_executions(context: DataContext | None) -> int:
    """How many times the dataset has been executed before.

    Ray Data publishes this count only as part of the seed with which it reshuffles on every execution.
    """
    seed = RandomSeedConfig(seed=0).get_seed_tuple(data_context=context) if context else None
    return (seed.execution_idx or 0) if seed else 0


def sample_table(samples: np.ndarray, epochs: np.ndarray, keys: pa.Table) -> pa.Table:
    """One row per sample: "sample", "epoch", the "key" of its picture and, for pairs, "lq_key"."""
    return keys.append_column("sample", pa.array(samples)).append_column("epoch", pa.array(epochs))


def _visited_v1(seed: int, epochs: np.ndarray, n: int, positions: np.ndarray) -> np.ndarray:
    """As `permuted`, of version 1."""
    found = np.zeros_like(positions)
    for epoch in np.unique(epochs).tolist():
        found[epochs == epoch] = _order(seed, epoch, n)[positions[epochs == epoch]]
    return found


_order = lru_cache(maxsize=2)(permutation)
