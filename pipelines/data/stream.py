"""Streams pictures from storage as (hr, lq) pairs: Ray Data tasks fetch, decode, crop and degrade on demand.

The picture, crop and degradation of a sample are a function of (seed, sample number) alone, independent of
the number of workers, the block layout and restarts. With c crops per picture, sample k belongs to epoch
k // (c * len(pictures)), which visits every picture once, for c consecutive samples, in an order of its own;
a batch may span two epochs. At any step, the workers together have consumed a prefix of the samples, so a
single number in a checkpoint records the position.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import ray.data
import ray.train

from ctmsr.degradation.config import DegradationConfig
from ctmsr.degradation.recipe import degrade
from ctmsr.errors import DataError
from ctmsr.image import center_crop, decode, paired_crop, random_crop, random_flip
from ctmsr.rng import Order, OrderVersion, sample_rng

from ..infra.ray_data import configured, in_order
from .pictures import Pictures, refuse_unusable
from .read_ahead import read_ahead
from .reading import Files, Found, Places, read_pictures, wanted
from .sample_order import NO_SAMPLE, SampleOrder, sample_table

_VAL_BLOCK_ROWS = 8
_VAL_SEED = 0
"""Fixed rather than the run's seed, so that runs are compared on identical held-out pictures."""
_CHECK_THREADS = 8
_CHECKED_PICTURES = 16

Rows = dict[str, np.ndarray]
StreamFactory = Callable[..., ray.data.Dataset]
"""`train_stream` with every argument bound except `num_workers`."""


@dataclass(frozen=True)
class _SampleSpec:
    """What a task needs to know to make samples."""

    places: Places
    hr_crop_size: int
    scale: int
    degradation: DegradationConfig
    seed: int
    is_centered: bool
    """Whether crops come from the centre instead of a random position."""
    flips: bool = False
    """Whether half of the crops are mirrored."""
    crops_per_picture: int = 1
    """Consecutive samples that share a picture."""


def check_images(pictures: Pictures, *, hr_crop_size: int) -> None:
    """Reads and decodes up to 32 pictures, or 16 spread over a longer list, before anything expensive starts.

    Raises:
        DataError: At least one of them cannot be read or is too small for a crop; the message says how many.
    """
    num_checked = len(pictures) if len(pictures) <= 2 * _CHECKED_PICTURES else _CHECKED_PICTURES
    checked = np.linspace(0, len(pictures) - 1, num_checked).astype(int)
    keys = pictures.keys.take(checked)
    columns = {name: keys[name].to_numpy() for name in keys.column_names}

    def problem(found: Found) -> tuple[str, str]:
        picture, files = found
        if isinstance(files, str):
            return picture.key, files
        path, data = files[0]
        try:
            center_crop(decode(data, name=path), hr_crop_size, name=path)
        except DataError as error:
            return picture.key, str(error)
        return picture.key, ""

    some = read_pictures(wanted(columns, range(num_checked)), pictures.places)
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        problems = sorted(pool.map(problem, some))
    refuse_unusable(pictures.uri, [text for _, text in problems], "checked")


def train_stream(
    pictures: Pictures,
    *,
    hr_crop_size: int,
    scale: int,
    degradation: DegradationConfig,
    seed: int,
    skip: int,
    total: int,
    global_batch_size: int,
    num_workers: int,
    flips: bool = False,
    order_version: OrderVersion = 2,
    crops_per_picture: int = 1,
    order: Order = "global",
) -> ray.data.Dataset:
    """Samples `skip` to `total` of an endless sequence, to be split among `num_workers` with equal=True.

    Whenever each worker has taken a batch of `rows_per_worker` rows, the workers together have consumed
    exactly the next `global_batch_size` samples. So a run may stop after any step and continue with `skip` =
    samples seen, on any number of workers. If the batch does not divide evenly, the last workers' share of
    every batch is padded with empty rows of sample number -1.

    Each iteration over the dataset yields the next, bounded part of the stream, until `total` is reached:
    keep iterating until the last step. Only sample numbers are planned ahead; tasks read the pictures while
    the stream is consumed.

    Args:
        pictures: From `find_pictures`. If they have LR pictures, these are cropped instead of degrading HR.
        hr_crop_size: Side of the HR crop in pixels, a multiple of `scale`.
        scale: HR/LQ ratio.
        degradation: How `lq` is made from `hr`.
        seed: Seed of order, crops and degradation.
        skip: Samples already consumed, a multiple of `global_batch_size`.
        total: Samples in the whole run; an incomplete last batch is dropped.
        global_batch_size: Samples per update, over all workers.
        num_workers: Number of consumers; it changes how samples are grouped, not which ones come.
        flips: Whether half of the crops are mirrored left to right; the seed decides which.
        order_version: See `SampleOrder`.
        crops_per_picture: Consecutive samples that are crops of one picture; a block decodes it once.
        order: Of the pictures; sharded, for those in shards, also depends on `global_batch_size`.

    Returns:
        Columns "hr" (uint8, hr_crop_size squared x 3), "lq" (uint8, 1/scale of the side), "sample" (int64:
        k), "key" (str), "file_bytes" (int64: read from storage for this row) and "problem" (str). A picture
        that is missing, undecodable or too small yields a black row with the problem, so that all other rows
        keep their positions. A failing store raises DataError in the task.
    """
    counts = skip, total, global_batch_size, num_workers
    plan = SampleOrder(pictures, seed, *counts, order_version, crops_per_picture, order)
    blocks = ray.data.read_datasource(plan, override_num_blocks=max(1, len(plan.get_read_tasks(1))))
    spec = _SampleSpec(
        pictures.places,
        hr_crop_size,
        scale,
        degradation,
        seed,
        is_centered=False,
        flips=flips,
        crops_per_picture=crops_per_picture,
    )
    return configured(blocks.map_batches(partial(_make_rows, spec=spec), batch_size=None))


def val_samples(
    pictures: Pictures,
    *,
    hr_crop_size: int,
    num_draws: int,
    scale: int,
    degradation: DegradationConfig,
) -> Iterator[dict[str, Any]]:
    """The centre of every picture, degraded in `num_draws` ways, identical every time and in every run.

    The next few are made by a thread while the consumer scores one.

    Yields:
        Rows with the columns of `train_stream`; the draws of a picture are consecutive.

    Raises:
        DataError: A picture cannot be read: scores on fewer pictures would not be comparable.
    """
    samples = np.arange(len(pictures) * num_draws)
    picture, draw = np.divmod(samples, num_draws)
    table = sample_table(samples, draw, pictures.keys.take(picture))
    spec = _SampleSpec(pictures.places, hr_crop_size, scale, degradation, _VAL_SEED, True)

    def block(start: int) -> Rows:
        part = table.slice(start, _VAL_BLOCK_ROWS)
        return _make_rows({name: part[name].to_numpy() for name in part.column_names}, spec)

    for made in read_ahead(map(block, range(0, len(samples), _VAL_BLOCK_ROWS)), 1):
        if problem := next(filter(None, made["problem"]), ""):
            raise DataError(problem)
        for values in zip(*made.values(), strict=True):
            yield dict(zip(made, values, strict=True))


class StreamConfig(ray.train.DataConfig):
    """How a trainer's datasets reach its workers: "train" is split, in order; others are given to all.

    The training stream depends on the number of workers, which an elastic run knows only once they start. So
    the trainer's `datasets` contain a factory, which is called here.
    """

    def __init__(self) -> None:
        super().__init__(datasets_to_split=["train"], execution_options=in_order())

    def configure(
        self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Called by Ray Train; returns the dataset iterators of each worker, by name."""
        made = {
            name: make(num_workers=world_size) if callable(make) else make for name, make in datasets.items()
        }
        return super().configure(made, world_size, *args, **kwargs)


def _make_rows(rows: Rows, spec: _SampleSpec) -> Rows:
    """One row per sample. Only one decoded picture is in memory at a time."""
    cv2.setNumThreads(1)  # Ray counts a task as one CPU
    num_rows, size, lq_size = len(rows["key"]), spec.hr_crop_size, spec.hr_crop_size // spec.scale
    made = {
        "hr": np.zeros((num_rows, size, size, 3), np.uint8),
        "lq": np.zeros((num_rows, lq_size, lq_size, 3), np.uint8),
        "sample": rows["sample"],
        "key": rows["key"],
        "file_bytes": np.zeros(num_rows, np.int64),
        "problem": np.full(num_rows, "", object),
    }
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(rows["key"].tolist()):
        if rows["sample"][row] != NO_SAMPLE:
            rows_of[key].append(row)
    pictures = wanted(rows, (where[0] for where in rows_of.values()))
    for picture, files in read_pictures(pictures, spec.places):
        _fill(made, rows["epoch"], rows_of[picture.key], picture.key, files, spec)
    made["problem"] = made["problem"].astype(str)
    return made


def _fill(
    made: Rows,
    epochs: np.ndarray,
    where: list[int],
    key: str,
    files: Files | str,
    spec: _SampleSpec,
) -> None:
    """Writes the samples of one picture into the rows `where`, or its problem into each of them."""
    if isinstance(files, str):
        made["problem"][where] = files
        return
    made["file_bytes"][where[0]] = sum(len(file) for _, file in files)
    size, name = spec.hr_crop_size, files[0][0]
    try:
        crops: tuple[np.ndarray, ...]
        hr_u8, *lq_u8 = (decode(file, name=path) for path, file in files)
        for row in where:
            crop = int(made["sample"][row]) % spec.crops_per_picture
            draw = partial(_sample_rng, spec.seed, int(epochs[row]), key, crop)
            if lq_u8:
                rng = None if spec.is_centered else draw("crop")
                crops = paired_crop(hr_u8, lq_u8[0], size, scale=spec.scale, rng=rng, name=name)
            elif spec.is_centered:
                crops = (center_crop(hr_u8, size, name=name),)
            else:
                crops = (random_crop(hr_u8, size, draw("crop"), name=name),)
            made["hr"][row], *lq = random_flip(*crops, rng=draw("flip")) if spec.flips else crops
            made["lq"][row] = (
                lq[0]
                if lq
                else degrade(made["hr"][row], scale=spec.scale, config=spec.degradation, rng=draw("degrade"))
            )
    except DataError as error:
        made["problem"][where] = str(error)


def _sample_rng(seed: int, epoch: int, key: str, crop: int, purpose: str) -> np.random.Generator:
    """That of a picture for its first crop, which has the same bits whatever the number of crops."""
    return sample_rng(seed, epoch, key, f"{purpose} {crop}" if crop else purpose)
