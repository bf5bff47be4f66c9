"""Pictures in storage to pairs (hr, lq): Ray Data tasks fetch, decode, crop and degrade as they are needed.

Which picture, crop and degradation a sample gets is a function of (seed, sample number) alone. The number of
workers, the layout of blocks and a restart in mid-run change nothing. Sample k belongs to epoch
k // len(pictures), in which every picture comes once, in an order of the epoch's own; a batch may end one
epoch and begin the next. All workers together have at any step consumed a prefix of the samples, so a
checkpoint records with one number what each epoch has consumed.
"""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import cv2
import numpy as np
import ray.data
import ray.train

from ctmsr.degradation import DegradationConfig, degrade
from ctmsr.errors import DataError
from ctmsr.image import center_crop, decode, paired_crop, random_crop
from ctmsr.rng import sample_rng

from ..infra.ray_data import configured, in_order
from ..infra.storage import open_uri, read_bytes
from .pictures import Pictures
from .sample_order import NO_SAMPLE, SampleOrder, sample_table

_VAL_BLOCK_ROWS = 8
_VAL_SEED = 0
"""Not the run's seed: runs are compared on equal held-out pictures."""
_FETCH_THREADS = 8
_CHECKED_PICTURES = 16

Rows = dict[str, np.ndarray]
StreamMaker = Callable[..., ray.data.Dataset]
"""`train_stream` with all arguments but `num_workers`."""


@dataclass(frozen=True)
class _Maker:
    """What a task needs to make samples of pictures."""

    folder: str
    lq_folder: str
    hr_crop_size: int
    scale: int
    degradation: DegradationConfig
    seed: int
    is_middle: bool
    """Crop the middle instead of a random place."""


def check_images(pictures: Pictures, *, hr_crop_size: int) -> None:
    """Reads and decodes up to 32 pictures, or 16 spread over a longer list, before anything expensive starts.

    Raises:
        DataError: One of them cannot be read or is too small for a crop; all such pictures are counted.
    """
    which = np.arange(len(pictures))
    if len(which) > 2 * _CHECKED_PICTURES:
        which = np.linspace(0, len(which) - 1, _CHECKED_PICTURES).astype(int)
    file_system, root = open_uri(pictures.folder)

    def problem(index: int) -> str | None:
        path = f"{root}/{pictures.keys[index].as_py()}"
        try:
            center_crop(decode(read_bytes(file_system, path), name=path), hr_crop_size, name=path)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        problems = [text for text in pool.map(problem, which.tolist()) if text]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(which)} pictures checked under {pictures.uri} fail. {problems[0]} "
            f"`python -m pipelines.index {pictures.uri}` finds all such pictures and sets them aside."
        )


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
) -> ray.data.Dataset:
    """The samples `skip`..`total` of one endless schedule, to be split among `num_workers` with equal=True.

    After every batch of `rows_per_worker` rows on each worker, all workers together have had exactly the next
    `global_batch_size` samples: a run may stop after any step and continue with `skip` = samples seen, on any
    number of workers. Where the batch does not divide, the last workers' rows end with empty ones of sample
    number -1, in every batch.

    One iteration gives a bounded part of the stream, the next one what follows, and nothing is left after
    `total`: iterate again until the last step is done. Planned are sample numbers only; pictures are read by
    tasks while the stream is consumed, and never held as a whole.

    Args:
        pictures: From `find_pictures`. Where they have LR pictures, these are cropped instead of degrading.
        hr_crop_size: Side of the HR crop in pixels, a multiple of `scale`.
        scale: HR/LQ ratio.
        degradation: How `lq` is made.
        seed: Seed of order, crops and degradation.
        skip: Samples already consumed, a multiple of `global_batch_size`.
        total: Samples of the whole run; a last part of a batch is dropped.
        global_batch_size: Samples an update over all workers.
        num_workers: Consumers. With another number every sample still comes once, in another grouping.

    Returns:
        Columns "hr" (uint8, hr_crop_size squared x 3), "lq" (uint8, 1/scale of the side), "sample" (int64:
        k), "key" (str), "file_bytes" (int64: read from storage for this row) and "problem" (str). A picture
        that is gone, cannot be decoded or is too small has a black row with its problem, so that the rows of
        the others stay where they are. A store that fails raises DataError in its task.
    """
    schedule = SampleOrder(pictures, seed, skip, total, global_batch_size, num_workers)
    blocks = ray.data.read_datasource(schedule, override_num_blocks=max(1, len(schedule.get_read_tasks(1))))
    maker = _Maker(pictures.folder, pictures.lq_folder, hr_crop_size, scale, degradation, seed, False)
    return configured(blocks.map_batches(partial(_train_rows, maker=maker), batch_size=None))


def val_samples(
    pictures: Pictures,
    *,
    hr_crop_size: int,
    num_draws: int,
    scale: int,
    degradation: DegradationConfig,
) -> ray.data.Dataset:
    """The middle of every picture, degraded in `num_draws` ways, alike every time and in every run.

    Columns are those of `train_stream`; the draws of a picture follow each other. A picture that cannot be
    read raises DataError in its task: scores on fewer pictures would not compare.
    """
    samples = np.arange(len(pictures) * num_draws)
    picture, draw = np.divmod(samples, num_draws)
    table = sample_table(pictures, samples, draw, picture)
    blocks = [table.slice(row, _VAL_BLOCK_ROWS) for row in range(0, len(samples), _VAL_BLOCK_ROWS)]
    maker = _Maker(pictures.folder, pictures.lq_folder, hr_crop_size, scale, degradation, _VAL_SEED, True)
    rows = ray.data.from_arrow(blocks).map_batches(partial(_val_rows, maker=maker), batch_size=None)
    return configured(rows)


class StreamConfig(ray.train.DataConfig):
    """How a trainer's data sets reach its workers: "train" in parts, in order, and others whole.

    The training stream depends on the number of workers, which an elastic run knows only when they start. So
    the trainer's `datasets` hold a function of it, which is called here.
    """

    def __init__(self) -> None:
        super().__init__(datasets_to_split=["train"], execution_options=in_order())

    def configure(
        self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Called by Ray Train with `datasets` and `world_size`; iterators by worker and name."""
        made = {
            name: make(num_workers=world_size) if callable(make) else make for name, make in datasets.items()
        }
        return super().configure(made, world_size, *args, **kwargs)


def _train_rows(rows: Rows, *, maker: _Maker) -> Rows:
    return _make_rows(rows, maker)


def _val_rows(rows: Rows, *, maker: _Maker) -> Rows:
    made = _make_rows(rows, maker)
    for problem in made["problem"]:
        if problem:
            raise DataError(problem)
    return made


def _make_rows(rows: Rows, maker: _Maker) -> Rows:
    """One row a sample. Of the decoded pictures, one at a time is in memory."""
    cv2.setNumThreads(1)  # Ray counts a task as one CPU
    num_rows, size, lq_size = len(rows["key"]), maker.hr_crop_size, maker.hr_crop_size // maker.scale
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
    lq_keys = rows["lq_key"].tolist() if "lq_key" in rows else None
    wanted = [(key, lq_keys[where[0]] if lq_keys else None) for key, where in rows_of.items()]
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        for key, files in zip(rows_of, pool.map(partial(_fetch, maker=maker), wanted), strict=True):
            _fill(made, rows["epoch"], rows_of[key], key, files, maker)
    made["problem"] = made["problem"].astype(str)
    return made


def _fetch(wanted: tuple[str, str | None], maker: _Maker) -> list[tuple[str, bytes]] | str:
    """Path and content of a picture, then of its LR picture if it has one; or that one is gone."""
    key, lq_key = wanted
    files = []
    for folder, name in ((maker.folder, key), (maker.lq_folder, lq_key)):
        if name is None:
            continue
        file_system, root = _open(folder)
        try:
            path = f"{root}/{name}"
            files.append((path, read_bytes(file_system, path)))
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise  # the store fails, not the picture
            return str(error)
    return files


def _fill(
    made: Rows,
    epochs: np.ndarray,
    where: list[int],
    key: str,
    files: list[tuple[str, bytes]] | str,
    maker: _Maker,
) -> None:
    """Writes the samples of one picture into the rows `where`, or into each what is wrong with it."""
    if isinstance(files, str):
        made["problem"][where] = files
        return
    made["file_bytes"][where[0]] = sum(len(file) for _, file in files)
    size, name = maker.hr_crop_size, files[0][0]
    try:
        hr_u8, *lq_u8 = (decode(file, name=path) for path, file in files)
        for row in where:
            draw = partial(sample_rng, maker.seed, int(epochs[row]), key)
            if lq_u8:
                rng = None if maker.is_middle else draw("crop")
                made["hr"][row], made["lq"][row] = paired_crop(
                    hr_u8, lq_u8[0], size, scale=maker.scale, rng=rng, name=name
                )
                continue
            if maker.is_middle:
                made["hr"][row] = center_crop(hr_u8, size, name=name)
            else:
                made["hr"][row] = random_crop(hr_u8, size, draw("crop"), name=name)
            made["lq"][row] = degrade(
                made["hr"][row], scale=maker.scale, config=maker.degradation, rng=draw("degrade")
            )
    except DataError as error:
        made["problem"][where] = str(error)


_open = lru_cache(maxsize=4)(open_uri)
