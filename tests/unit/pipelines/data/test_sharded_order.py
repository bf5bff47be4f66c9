"""The order of pictures in shards: each comes once an epoch, in few requests, in batches from everywhere."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.config import to_dict
from ctmsr.errors import ConfigError
from pipelines.config.identity import RUN, search_identity
from pipelines.config.run_config import DataConfig, RunConfig
from pipelines.data.keys import ListedKeys
from pipelines.data.pictures import Pictures
from pipelines.data.reading import spans, wanted
from pipelines.data.sample_order import SampleOrder
from pipelines.data.sharded_order import sharded
from pipelines.data.tars import BLOCK

SHARD_PICTURES, SIZE = 500, 100_000


def in_tars(num_pictures: int) -> Pictures:
    """Pictures of a size, in tars."""
    numbers = np.arange(num_pictures)
    table = pa.table(
        {
            "key": pa.array([f"{n // SHARD_PICTURES:06}.tar/{n:09}.jpg" for n in numbers.tolist()]),
            "shard": np.full(num_pictures, len("000000.tar"), np.int32),
            "offset": BLOCK + numbers % SHARD_PICTURES * (SIZE + BLOCK),
            "length": np.full(num_pictures, SIZE),
        }
    )
    return Pictures("tars", ListedKeys(table), "tars", "v", has_shards=True)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 3000), batch=st.integers(1, 70), seed=st.integers(0, 2**32), epoch=st.integers(0, 99))
def test_every_picture_comes_once_an_epoch(n: int, batch: int, seed: int, epoch: int) -> None:
    samples = np.arange(epoch * n, (epoch + 1) * n)
    found = sharded(seed, samples, n, batch)
    assert sorted(found.tolist()) == list(range(n))
    at = [0, n // 2, n - 1]
    assert sharded(seed, samples[at], n, batch).tolist() == found[at].tolist()  # whatever else is asked


@pytest.mark.parametrize(
    ("batch", "num_workers"), [(16, 1), (32, 1), (32, 4), (64, 1), (256, 8), (48, 3), (256, 32), (32, 16)]
)
def test_a_sample_costs_a_twentieth_of_a_request(batch: int, num_workers: int) -> None:
    skip = 7 * batch
    order = SampleOrder(in_tars(40_000), 0, skip, 10**9, batch, num_workers, order="sharded")
    num_requests = num_samples = num_bytes = 0
    for task in order.get_read_tasks(1)[:64]:
        (block,) = task.read_fn()
        columns = {name: block[name].to_numpy() for name in block.column_names}
        pictures = wanted(columns, range(len(block)))
        for shard in {picture.shard_key for picture in pictures}:
            for span in spans([picture for picture in pictures if picture.shard_key == shard]):
                num_requests += 1
                num_bytes += span[-1].end - span[0].offset
        num_samples += len(block)
    assert num_requests / num_samples <= 0.05
    assert num_bytes / num_samples <= 2.1 * SIZE


def test_a_batch_mixes_pictures_from_all_over_the_set() -> None:
    n, batch = 40_000, 32
    steps = sharded(3, np.arange(10 * n // batch * batch), n, batch).reshape(-1, batch)
    places = np.sort(steps, axis=1)
    assert (np.diff(places, axis=1) > 4).sum(axis=1).min() >= 5  # eight readers, some side by side
    assert abs(steps.mean(axis=1).std() / (n / np.sqrt(12 * batch / 4)) - 1) < 0.2  # as of 8 random places
    first, second = (sharded(3, np.arange(epoch * n, (epoch + 1) * n), n, batch) for epoch in range(2))
    assert (first == second).mean() < 0.01


def test_the_order_is_pinned() -> None:
    """A change here changes every run in this order: give the order a version if it is meant."""
    found = sharded(5, np.array([0, 1, 4, 5_000, 10**10]), 40_000, 32)
    assert found.tolist() == [5794, 5795, 20266, 36450, 12309]


def test_the_order_belongs_to_a_run_and_runs_of_before_are_global() -> None:
    before = to_dict(RunConfig())
    del before["data"]["order"]
    now = to_dict(RunConfig(data=DataConfig(order="sharded")))
    for identity in (RUN, search_identity(())):
        assert identity.changes(before, to_dict(RunConfig())) == []
        assert identity.changes(before, now) == ["data.order: global -> sharded"]
    with pytest.raises(ConfigError, match=r"data\.order=sharded has no version 1"):
        DataConfig(order="sharded", order_version=1)
