"""Pictures in storage to pairs (hr, lq): Ray Data tasks fetch, decode, crop and degrade as they are needed.

Which picture, crop and degradation a sample gets is a function of (seed, sample number) alone. The number of
workers, the layout of blocks and a restart in mid-run change nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ctmsr.degradation import DegradationConfig, degrade
from ctmsr.errors import DataError
from ctmsr.image import center_crop, decode, random_crop
from ctmsr.rng import permutation, sample_rng

from .storage import ImageRef, open_uri, read_bytes

_MIN_BLOCK_ROWS = 40
"""A block costs Ray Data the same whatever it holds: 40 rows gave 1.6 to 2 times the images/s of 20."""
_ROUND_BLOCKS = 128
"""Blocks of one execution of the stream. Ray Data plans them all, 3 ms each, before the first one runs."""
_VAL_BLOCK_ROWS = 8
_VAL_SEED = 0
"""Not the run's seed: runs are compared on equal held-out pictures."""
_FETCH_THREADS = 8
_CHECKED_PICTURES = 16

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Source:
    """What a task needs to make samples. Arrow arrays reach it through shared memory, without a copy."""

    uri: str
    keys: pa.Array
    paths: pa.Array
    hr_crop_size: int
    scale: int
    degradation: DegradationConfig


def check_images(uri: str, refs: Sequence[ImageRef], *, hr_crop_size: int) -> None:
    """Reads and decodes up to 32 pictures, or 16 spread over a longer list, before anything expensive starts.

    Raises:
        DataError: One of them cannot be read or is too small for a crop; all such pictures are counted.
    """
    if len(refs) > 2 * _CHECKED_PICTURES:
        spread = np.linspace(0, len(refs) - 1, _CHECKED_PICTURES).astype(int)
        refs = [refs[index] for index in spread]
    file_system, _ = open_uri(uri)

    def problem(ref: ImageRef) -> str | None:
        try:
            center_crop(decode(read_bytes(file_system, ref.path), name=ref.path), hr_crop_size, name=ref.path)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        problems = [text for text in pool.map(problem, refs) if text]
    if problems:
        raise DataError(f"{len(problems)} of {len(refs)} pictures checked under {uri} fail. {problems[0]}")


def train_stream(
    uri: str,
    refs: Sequence[ImageRef],
    *,
    hr_crop_size: int,
    scale: int,
    degradation: DegradationConfig,
    seed: int,
    skip: int,
    total: int,
    global_batch_size: int,
    num_workers: int,
) -> ray.data.Dataset:
    """The samples `skip`..`total` of one endless schedule, to be split among `num_workers` with equal=True.

    Sample k belongs to epoch k // len(refs), in which the seed orders all pictures anew. After every batch of
    global_batch_size / num_workers rows on each worker, all workers together have had exactly the next
    `global_batch_size` samples: a run may stop after any step and continue with `skip` = samples seen.

    One iteration gives a bounded part of the stream, the next one what follows, and nothing is left after
    `total`: iterate again until the last step is done. Planned are sample numbers only; pictures are read by
    tasks while the stream is consumed, and never held as a whole.

    Args:
        uri: Folder that `refs` were listed from.
        refs: Pictures, as `list_images` gives them.
        hr_crop_size: Side of the HR crop in pixels, a multiple of `scale`.
        scale: HR/LQ ratio.
        degradation: How `lq` is made.
        seed: Seed of order, crops and degradation.
        skip: Samples already consumed, a multiple of `global_batch_size`.
        total: Samples of the whole run; a last part of a batch is dropped.
        global_batch_size: Rows an update over all workers, a multiple of `num_workers`.
        num_workers: Consumers. With another number every sample still comes once, in another grouping.

    Returns:
        Columns "hr" (uint8, hr_crop_size squared x 3), "lq" (uint8, 1/scale of the side), "sample" (int64: k)
        and "key" (str). A picture that cannot be read or is too small raises DataError in its task.
    """
    schedule = _Schedule(skip, total, global_batch_size, num_workers)
    blocks = ray.data.read_datasource(schedule, override_num_blocks=max(1, len(schedule.get_read_tasks(1))))
    source = _source(uri, refs, hr_crop_size, scale, degradation)
    return _configured(blocks.map_batches(partial(_train_rows, source=source, seed=seed), batch_size=None))


def val_samples(
    uri: str,
    refs: Sequence[ImageRef],
    *,
    hr_crop_size: int,
    num_draws: int,
    scale: int,
    degradation: DegradationConfig,
) -> ray.data.Dataset:
    """The middle of every picture, degraded in `num_draws` ways, alike every time and in every run.

    Columns are those of `train_stream`; the draws of a picture follow each other.
    """
    num_rows = len(refs) * num_draws
    blocks = ray.data.range(num_rows, override_num_blocks=-(-num_rows // _VAL_BLOCK_ROWS))
    source = _source(uri, refs, hr_crop_size, scale, degradation)
    return _configured(
        blocks.map_batches(partial(_val_rows, source=source, num_draws=num_draws), batch_size=None)
    )


def whole_pictures(
    lq_uri: str, lq_refs: Sequence[ImageRef], hr_uri: str, hr_refs: Sequence[ImageRef], *, scale: int
) -> Iterator[dict[str, Any]]:
    """LR pictures as they are, each with its HR picture where `hr_refs` are given; one pair in memory.

    Yields:
        Rows of "key", "lq" and "hr" (uint8 HWC; None without a reference), in the order of `lq_refs`.

    Raises:
        DataError: A picture cannot be read, or HR is not `scale` times as large as LR.
    """
    (lq_system, _), (hr_system, _) = open_uri(lq_uri), open_uri(hr_uri or lq_uri)
    hr_paths = {pair_key(ref): ref.path for ref in hr_refs}
    for ref in lq_refs:
        lq_u8 = decode(read_bytes(lq_system, ref.path), name=ref.path)
        hr_u8 = None
        if path := hr_paths.get(pair_key(ref)):
            hr_u8 = decode(read_bytes(hr_system, path), name=path)
            (height, width), (lq_height, lq_width) = hr_u8.shape[:2], lq_u8.shape[:2]
            if (height, width) != (scale * lq_height, scale * lq_width):
                raise DataError(
                    f"{path} is {width}x{height} pixels and its LR picture {ref.path} "
                    f"{lq_width}x{lq_height}, not {scale} times less. Crop it, or leave the pair out."
                )
        yield {"key": ref.key, "lq": lq_u8, "hr": hr_u8}


def check_pairs(lq_uri: str, lq_refs: Sequence[ImageRef], hr_uri: str, hr_refs: Sequence[ImageRef]) -> None:
    """Every LR picture needs exactly one HR picture.

    Raises:
        DataError: One has none, or two pictures of a folder have one key.
    """
    for uri, refs in ((lq_uri, lq_refs), (hr_uri, hr_refs)):
        keys = [pair_key(ref) for ref in refs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise DataError(f"{uri} holds two pictures {twice[0]}.*, so pairs are unclear. Rename one.")
    known = {pair_key(ref) for ref in hr_refs}
    if alone := [ref.key for ref in lq_refs if pair_key(ref) not in known]:
        raise DataError(
            f"{len(alone)} of {len(lq_refs)} pictures under {lq_uri} have no HR picture of their name under "
            f"{hr_uri}: {', '.join(alone[:3])}. Name pairs alike, or set data.test_uri= to score without."
        )


def pair_key(ref: ImageRef) -> str:
    """What the two pictures of a pair have in common: the key without its suffix."""
    return str(PurePosixPath(ref.key).with_suffix(""))


def execution_options() -> ray.data.ExecutionOptions:
    """For `ray.train.DataConfig`, which replaces a data set's own: blocks are handed out in order."""
    return ray.data.ExecutionOptions(preserve_order=True)


class _Schedule(Datasource):
    """Blocks of sample numbers such that block j holds the rows of worker j % num_workers, step by step."""

    def __init__(self, skip: int, total: int, global_batch_size: int, num_workers: int) -> None:
        super().__init__()
        self._skip = skip
        self._num_steps = max(0, total - skip) // global_batch_size
        self._global_batch_size = global_batch_size
        self._num_workers = num_workers
        self._steps_per_block = -(-_MIN_BLOCK_ROWS * num_workers // global_batch_size)
        self._steps_per_round = self._steps_per_block * max(1, _ROUND_BLOCKS // num_workers)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        # The counter behind Ray Data's reseed_after_execution: how often the data set has been run through.
        first = self._steps_per_round * (0 if data_context is None else data_context._execution_idx)
        stop = min(first + self._steps_per_round, self._num_steps)
        tasks = []
        for step in range(first, stop, self._steps_per_block):
            steps = np.arange(step, min(step + self._steps_per_block, stop))
            numbers = steps[:, None] * self._global_batch_size + np.arange(self._global_batch_size)
            by_worker = numbers.reshape(len(steps), self._num_workers, -1)  # axes: step, worker, row
            tasks += [_number_task(self._skip + by_worker[:, w].ravel()) for w in range(self._num_workers)]
        return tasks


def _number_task(samples: np.ndarray) -> ReadTask:
    block = pa.table({"sample": samples})
    metadata = BlockMetadata(
        num_rows=block.num_rows, size_bytes=block.nbytes, exec_stats=None, input_files=None
    )
    return ReadTask(lambda: [block], metadata)


def _source(
    uri: str, refs: Sequence[ImageRef], hr_crop_size: int, scale: int, degradation: DegradationConfig
) -> _Source:
    keys, paths = pa.array([ref.key for ref in refs]), pa.array([ref.path for ref in refs])
    return _Source(uri, keys, paths, hr_crop_size, scale, degradation)


def _configured(dataset: ray.data.Dataset) -> ray.data.Dataset:
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # With it, tasks that wait for a slow trainer keep Ray Data's scheduling loop spinning: half a core lost.
    # What it would bound, the data made ahead, is bounded by _ROUND_BLOCKS.
    context.op_resource_reservation_enabled = False
    context.execution_options = execution_options()
    return dataset


def _train_rows(rows: Rows, *, source: _Source, seed: int) -> Rows:
    samples, num_pictures = rows["sample"], len(source.keys)
    epochs, positions = np.divmod(samples, num_pictures)
    pictures = [_order(seed, int(e), num_pictures)[p] for e, p in zip(epochs, positions, strict=True)]
    return _make_rows(samples, epochs, pictures, random_crop, source, seed)


def _val_rows(rows: Rows, *, source: _Source, num_draws: int) -> Rows:
    def middle(hr_u8: np.ndarray, size: int, _: np.random.Generator, *, name: str) -> np.ndarray:
        return center_crop(hr_u8, size, name=name)

    samples = rows["id"]
    pictures, draws = np.divmod(samples, num_draws)
    return _make_rows(samples, draws, pictures, middle, source, _VAL_SEED)


def _make_rows(
    samples: np.ndarray,
    epochs: np.ndarray,
    pictures: Sequence[int] | np.ndarray,
    crop: Callable[..., np.ndarray],
    source: _Source,
    seed: int,
) -> Rows:
    """One row a sample, from picture `pictures[row]`. Of the decoded pictures, one at a time is in memory."""
    cv2.setNumThreads(1)  # Ray counts a task as one CPU
    size, lq_size = source.hr_crop_size, source.hr_crop_size // source.scale
    hr = np.empty((len(samples), size, size, 3), np.uint8)
    lq = np.empty((len(samples), lq_size, lq_size, 3), np.uint8)
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, picture in enumerate(pictures):
        rows_of[int(picture)].append(row)
    file_system, _ = _open(source.uri)
    paths = [source.paths[picture].as_py() for picture in rows_of]
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        files = pool.map(partial(read_bytes, file_system), paths)
        for picture, path, data in zip(rows_of, paths, files, strict=True):
            hr_u8, key = decode(data, name=path), source.keys[picture].as_py()
            for row in rows_of[picture]:
                draw = partial(sample_rng, seed, int(epochs[row]), key)
                hr[row] = crop(hr_u8, size, draw("crop"), name=path)
                lq[row] = degrade(hr[row], scale=source.scale, config=source.degradation, rng=draw("degrade"))
    keys = np.array([source.keys[int(picture)].as_py() for picture in pictures])
    return {"hr": hr, "lq": lq, "sample": samples, "key": keys}


_open = lru_cache(maxsize=4)(open_uri)
_order = lru_cache(maxsize=4)(permutation)
