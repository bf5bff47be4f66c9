"""The same samples from files and from shards, in any order, on any workers and after any restart."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.degradation.config import DegradationConfig
from ctmsr.degradation.recipe import degrade
from ctmsr.image import decode, encode_png, random_crop
from ctmsr.rng import Order, sample_rng
from pipelines.data.pictures import Pictures
from pipelines.data.sample_order import SampleOrder
from pipelines.data.stream import _make_rows, _SampleSpec
from tests.support.keys import keys_of
from tests.support.shards import indexed, parquet_of, tar_of

SEED, CROP = 3, 32
PHOTOS = [
    encode_png(np.random.default_rng(number).integers(0, 256, (CROP + number, 40, 3), np.uint8))
    for number in range(13)
]
Sample = tuple[str, bytes, bytes]
"""Key, hr and lq."""
Form = tuple[Pictures, dict[str, bytes]]
"""Pictures, and the file of each by key."""


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Form]:
    folder = tmp_path_factory.mktemp("forms")
    names = [f"{number:02}.png" for number in range(len(PHOTOS))]
    files = dict(zip(names, PHOTOS, strict=True))
    for name, data in files.items():
        (folder / "object").mkdir(exist_ok=True)
        (folder / "object" / name).write_bytes(data)
    in_tars: dict[str, bytes] = {}
    (folder / "tar").mkdir()
    for number in range(3):
        some = {name: files[name] for name in names[number::3]}
        (folder / f"tar/{number}.tar").write_bytes(tar_of({"about.json": b"{}", **some}))
        in_tars |= {f"{number}.tar/{name}": data for name, data in some.items()}
    in_rows: dict[str, bytes] = {}
    (folder / "parquet").mkdir()
    for number in range(2):
        some = {name: files[name] for name in names[number::2]}
        (folder / f"parquet/{number}.parquet").write_bytes(parquet_of(some))
        in_rows |= {f"{number}.parquet/{row:08}": data for row, data in enumerate(some.values())}
    return {
        "object": (indexed(str(folder / "object"), folder / "object"), files),
        "tar": (indexed(str(folder / "tar"), folder / "tar"), in_tars),
        "parquet": (indexed(str(folder / "parquet"), folder / "parquet"), in_rows),
    }


def samples_of(
    pictures: Pictures, order: Order, skip: int, num_steps: int, batch: int, num_workers: int
) -> dict[int, Sample]:
    """What all workers get together."""
    total = skip + num_steps * batch
    plan = SampleOrder(pictures, SEED, skip, total, batch, num_workers, order=order)
    spec = _SampleSpec(pictures.places, CROP, 4, DegradationConfig(), SEED, False)
    found = {}
    for task in plan.get_read_tasks(1):
        (block,) = task.read_fn()
        rows = {name: block[name].to_numpy(zero_copy_only=False) for name in block.column_names}
        made = _make_rows(rows, spec=spec)
        assert set(made["problem"]) == {""}
        for sample, key, hr, lq in zip(made["sample"], made["key"], made["hr"], made["lq"], strict=True):
            if sample >= 0:
                assert int(sample) not in found
                found[int(sample)] = (str(key), hr.tobytes(), lq.tobytes())
    assert sorted(found) == list(range(skip, total))
    return found


@cache
def expected(data: bytes, key: str, epoch: int) -> tuple[bytes, bytes]:
    """A sample by its definition."""
    hr_u8 = random_crop(decode(data, name=key), CROP, sample_rng(SEED, epoch, key, "crop"), name=key)
    rng = sample_rng(SEED, epoch, key, "degrade")
    return hr_u8.tobytes(), degrade(hr_u8, scale=4, config=DegradationConfig(), rng=rng).tobytes()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["object", "tar", "parquet"]),
    order=st.sampled_from(["global", "sharded"]),
    batch=st.integers(1, 9),
    runs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_samples_are_what_files_give_whatever_is_killed(
    forms: dict[str, Form], name: str, order: Order, batch: int, runs: list[tuple[int, int]]
) -> None:
    """Runs are of some steps on some workers, one after the other."""
    pictures, files = forms[name]
    assert keys_of(pictures) == list(files)
    found: dict[int, Sample] = {}
    for num_steps, num_workers in runs:
        workers = min(num_workers, batch)
        found |= samples_of(pictures, order, len(found), num_steps, batch, workers)
    for sample, (key, *made) in found.items():
        assert tuple(made) == expected(files[key], key, sample // len(pictures))
    for start in range(0, len(found) - len(files) + 1, len(files)):
        epoch = [found[sample][0] for sample in range(start, start + len(files))]
        assert sorted(epoch) == sorted(files)
