"""Properties of the stream at any sizes: every picture once an epoch, a sample the same wherever made."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.degradation.config import DegradationConfig
from ctmsr.image import encode_png
from ctmsr.rng import Order, OrderVersion
from pipelines.data.keys import ListedKeys
from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.sample_order import SampleOrder, rows_per_worker
from pipelines.data.stream import Rows, _make_rows, _SampleSpec

NUM_PICTURES = 7

Form = tuple[OrderVersion, Order]


def consume(
    pictures: Pictures, seed: int, order: Form, runs: list[tuple[int, int]], batch: int, crops: int
) -> list[list[str]]:
    """Keys by step, as workers take them that are killed and go on.

    Args:
        pictures: The index.
        seed: Of the order.
        order: Its version and its form.
        runs: (steps until the run is killed, workers), one after the other.
        batch: Samples of a step, over all workers.
        crops: Consecutive samples of a picture.
    """
    steps: list[list[str]] = []
    total = batch * sum(num_steps for num_steps, _ in runs)
    for num_steps, num_workers in runs:
        counts = batch * len(steps), total, batch, num_workers
        schedule = SampleOrder(pictures, seed, *counts, order[0], crops, order[1])
        part = rows_per_worker(batch, num_workers)
        lines: list[list[tuple[int, str]]] = [[] for _ in range(num_workers)]
        execution = 0
        while len(lines[0]) < num_steps * part:
            context = SimpleNamespace(_execution_idx=execution)
            tasks = schedule.get_read_tasks(1, data_context=context)
            for number, task in enumerate(tasks):  # streaming_split hands them out in turn
                (block,) = task.read_fn()
                lines[number % num_workers] += zip(
                    block["sample"].to_pylist(), block["key"].to_pylist(), strict=True
                )
            execution += 1
        steps += [
            [key for line in lines for sample, key in line[step * part : (step + 1) * part] if sample >= 0]
            for step in range(num_steps)
        ]
    return steps


@settings(max_examples=60, deadline=None)
@given(
    num_pictures=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    order=st.sampled_from([(1, "global"), (2, "global"), (2, "sharded")]),
    batch=st.integers(7, 72),
    runs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 7)), min_size=1, max_size=4),
    crops=st.sampled_from([1, 1, 2, 5]),
)
def test_every_picture_comes_once_an_epoch_whatever_is_killed(
    num_pictures: int, seed: int, order: Form, batch: int, runs: list[tuple[int, int]], crops: int
) -> None:
    names = pa.array([f"{i}.png" for i in range(num_pictures)], pa.large_string())
    pictures = Pictures("p", ListedKeys(pa.table({"key": names})), "p", "v")
    steps = consume(pictures, seed, order, runs, batch, crops)
    keys = [key for step in steps for key in step]
    whole = consume(pictures, seed, order, [(len(steps), 1)], batch, crops)
    assert [sorted(step) for step in steps] == [sorted(step) for step in whole]  # the same images a step
    samples = [key for step in whole for key in step]
    keys = samples[::crops]
    assert samples == [key for key in keys for _ in range(crops)][: len(samples)]
    epochs = [keys[start : start + num_pictures] for start in range(0, len(keys), num_pictures)]
    for epoch in epochs:
        assert max(Counter(epoch).values()) == 1
    assert all(sorted(epoch) == sorted(names.to_pylist()) for epoch in epochs[:-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        (path / f"{i}.png").write_bytes(encode_png(draw.integers(0, 256, (40 + i, 50, 3), np.uint8)))
    return path


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_sample_is_the_same_bytes_in_any_block(folder: Path, data: st.DataObject) -> None:
    pictures = find_pictures(str(folder))
    samples = data.draw(st.lists(st.integers(0, 5 * NUM_PICTURES), min_size=1, max_size=12, unique=True))
    cut = data.draw(st.integers(0, len(samples)))
    crops = data.draw(st.integers(1, 3))
    together = make(pictures, samples, crops)
    apart = [make(pictures, part, crops) for part in (samples[cut:], samples[:cut]) if part]
    found = {number: sample for part in apart for number, sample in part.items()}
    assert found == together


def test_crops_of_one_picture_differ_and_the_first_is_that_of_a_stream_of_single_crops(folder: Path) -> None:
    pictures = find_pictures(str(folder))
    single = make(pictures, list(range(2 * NUM_PICTURES)))
    triple = make(pictures, list(range(2 * 3 * NUM_PICTURES)), crops=3)
    assert len({sample[1:] for sample in triple.values()}) == len(triple)
    assert {number: triple[3 * number] for number in single} == single


def make(pictures: Pictures, samples: list[int], crops: int = 1) -> dict[int, tuple[str, bytes, bytes]]:
    """Key, hr and lq by sample number, made in one task."""
    order = SampleOrder(pictures, 3, 0, 0, 1, 1, crops_per_picture=crops)
    (block,) = order._task(np.array(samples)).read_fn()
    rows: Rows = {name: block[name].to_numpy(zero_copy_only=False) for name in block.column_names}
    spec = _SampleSpec(
        pictures.places, 32, 4, DegradationConfig(), 3, is_centered=False, crops_per_picture=crops
    )
    made = _make_rows(rows, spec=spec)
    return {
        int(number): (str(key), hr.tobytes(), lq.tobytes())
        for number, key, hr, lq in zip(made["sample"], made["key"], made["hr"], made["lq"], strict=True)
    }
