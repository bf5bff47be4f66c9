"""The training stream: a sample is a function of seed and number, on any workers and after any restart."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray.data

from ctmsr.degradation.config import DegradationConfig
from ctmsr.errors import DataError
from ctmsr.image import center_crop, decode, encode_png
from pipelines.data import sample_order
from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.stream import check_images, train_stream, val_samples
from tests.conftest import S3

BATCH = 8
"""Samples an update, over all workers."""
LOOK: dict[str, Any] = {"hr_crop_size": 64, "scale": 4, "degradation": DegradationConfig()}

Batch = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def pictures(ray_session: None, s3: S3, photos: dict[str, bytes]) -> Pictures:
    """Five photographs in S3."""
    uri = s3.make_bucket("data-photos", {f"train/{name}": file for name, file in photos.items()}) + "/train"
    return find_pictures(uri)


def stream(pictures: Pictures, **changes: Any) -> ray.data.Dataset:
    arguments: dict[str, Any] = {
        "seed": 1,
        "skip": 0,
        "total": 12 * BATCH,
        "global_batch_size": BATCH,
        "num_workers": 1,
    }
    return train_stream(pictures, **LOOK | arguments | changes)


def batches(dataset: Any, size: int = BATCH) -> list[Batch]:
    return list(dataset.iter_batches(batch_size=size, batch_format="numpy"))


def by_sample(parts: Sequence[Batch]) -> dict[int, tuple[str, bytes, bytes]]:
    """Key, `hr` and `lq` of every sample; a sample that comes twice is an error."""
    rows = [
        row for part in parts for row in zip(part["sample"], part["key"], part["hr"], part["lq"], strict=True)
    ]
    found = {int(number): (str(key), hr.tobytes(), lq.tobytes()) for number, key, hr, lq in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def alone(pictures: Pictures) -> dict[int, tuple[str, bytes, bytes]]:
    """What a single worker gets."""
    return by_sample(batches(stream(pictures)))


def test_every_epoch_visits_every_picture_once_with_other_crops(
    alone: dict[int, tuple[str, bytes, bytes]], photos: dict[str, bytes]
) -> None:
    assert list(alone) == list(range(12 * BATCH))
    num_epochs = len(alone) // len(photos)
    orders = [[alone[e * len(photos) + i][0] for i in range(len(photos))] for e in range(num_epochs)]
    assert all(sorted(order) == sorted(photos) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    for part in (1, 2):  # hr, lq
        assert len({sample[part] for sample in alone.values()}) == len(alone)


def test_two_workers_get_each_step_together_what_one_gets_alone(
    alone: dict[int, tuple[str, bytes, bytes]], pictures: Pictures
) -> None:
    shards = stream(pictures, num_workers=2).streaming_split(2, equal=True)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda shard: batches(shard, BATCH // 2), shards)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        together = sorted([*a["sample"], *b["sample"]])
        assert together == list(range(step * BATCH, (step + 1) * BATCH))
    assert by_sample([*first, *second]) == alone
    stats = shards[0].stats()
    assert "MapBatches" in stats
    assert "tasks executed" in stats


def test_a_stream_resumes_at_any_step_and_goes_on_over_iterations(
    alone: dict[int, tuple[str, bytes, bytes]],
    pictures: Pictures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample_order, "_MIN_BLOCK_ROWS", 5 * BATCH)
    monkeypatch.setattr(sample_order, "_ROUND_BLOCKS", 1)  # five steps an iteration
    resumed = stream(pictures, skip=5 * BATCH)
    parts = [batches(resumed) for _ in range(3)]
    assert [len(part) for part in parts] == [5, 2, 0]
    numbers = [int(number) for part in parts for batch in part for number in batch["sample"]]
    assert numbers == list(range(5 * BATCH, 12 * BATCH))
    assert by_sample([batch for part in parts for batch in part]) == {n: alone[n] for n in numbers}


def test_another_seed_gives_other_samples(
    alone: dict[int, tuple[str, bytes, bytes]], pictures: Pictures
) -> None:
    other = by_sample(batches(stream(pictures, seed=2, total=3 * BATCH)))
    assert all(other[number] != alone[number] for number in other)


def test_half_of_the_crops_are_mirrored_where_asked(
    alone: dict[int, tuple[str, bytes, bytes]], pictures: Pictures
) -> None:
    rows = batches(stream(pictures, total=12 * BATCH, flips=True))
    hr_u8 = {int(number): hr for part in rows for number, hr in zip(part["sample"], part["hr"], strict=True)}
    plain = {number: np.frombuffer(hr, np.uint8).reshape(64, 64, 3) for number, (_, hr, _) in alone.items()}
    mirrored = {number for number, hr in hr_u8.items() if not np.array_equal(hr, plain[number])}
    assert all(np.array_equal(hr_u8[number][:, ::-1], plain[number]) for number in mirrored)
    assert 0.25 < len(mirrored) / len(alone) < 0.75


def test_a_stream_without_end_is_never_made_as_a_whole(pictures: Pictures) -> None:
    endless = stream(pictures, total=10**12)
    first = next(iter(endless.iter_batches(batch_size=BATCH, batch_format="numpy")))
    assert list(first["sample"]) == list(range(BATCH))
    assert {name: (column.dtype, column.shape[1:]) for name, column in first.items()} == {
        "hr": (np.uint8, (64, 64, 3)),
        "lq": (np.uint8, (16, 16, 3)),
        "sample": (np.int64, ()),
        "key": (np.object_, ()),
        "file_bytes": (np.int64, ()),
        "problem": (np.object_, ()),
    }


def test_held_out_pictures_are_the_same_every_time(pictures: Pictures, photos: dict[str, bytes]) -> None:
    first = list(val_samples(pictures, **LOOK, num_draws=2))
    assert [row["key"] for row in first] == [key for key in sorted(photos) for _ in range(2)]
    assert len({row["lq"].tobytes() for row in first}) == 2 * len(photos)
    for row in first:
        assert np.array_equal(row["hr"], center_crop(decode(photos[row["key"]], name=""), 64, name=""))
    again = val_samples(pictures, **LOOK, num_draws=2)
    for row, other in zip(first, again, strict=True):
        assert row["lq"].tobytes() == other["lq"].tobytes()


def test_bad_pictures_are_found_before_training_and_counted(
    s3: S3, photos: dict[str, bytes], pictures: Pictures
) -> None:
    check_images(pictures, hr_crop_size=64)
    small = encode_png(np.zeros((32, 200, 3), np.uint8))
    uri = s3.make_bucket("data-bad", {"a.png": small, "b.png": b"not a picture", **photos})
    with pytest.raises(DataError, match=r"2 of 7 pictures .*a\.png is 200x32 pixels, too small"):
        check_images(find_pictures(uri), hr_crop_size=64)
    uri = s3.make_bucket("data-many", {f"{i:03d}.png": b"not a picture" for i in range(40)})
    with pytest.raises(DataError, match=r"16 of 16 pictures .* not a readable picture"):
        check_images(find_pictures(uri), hr_crop_size=64)


def test_a_picture_that_is_gone_or_damaged_leaves_a_row_with_its_problem(
    s3: S3, ray_session: None, photos: dict[str, bytes], alone: dict[int, tuple[str, bytes, bytes]]
) -> None:
    uri = s3.make_bucket("data-gone-bad", {f"train/{name}": file for name, file in photos.items()})
    pictures = find_pictures(f"{uri}/train")
    s3.client.put_object(Bucket="data-gone-bad", Key="train/coffee.png", Body=photos["coffee.png"][:2000])
    s3.client.delete_object(Bucket="data-gone-bad", Key="train/rocket.png")
    parts = batches(stream(pictures))
    problems = {
        str(key): str(problem)
        for part in parts
        for key, problem in zip(part["key"], part["problem"], strict=True)
    }
    assert problems.pop("coffee.png").startswith("data-gone-bad/train/coffee.png is not a readable picture")
    assert problems.pop("rocket.png") == "data-gone-bad/train/rocket.png does not exist. Check the path."
    assert set(problems.values()) == {""}
    found = by_sample(parts)
    assert found.keys() == alone.keys()
    for number, sample in alone.items():
        assert (found[number] == sample) == (sample[0] not in ("coffee.png", "rocket.png"))
    with pytest.raises(DataError, match=r"(coffee|rocket)\.png"):
        list(val_samples(pictures, **LOOK, num_draws=1))
