"""Training on tars and Parquet files in a bucket, through the commands and Ray; unit tests have folders."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ctmsr.degradation.config import DegradationConfig
from ctmsr.errors import ConfigError
from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.stream import check_images, train_stream, val_samples
from pipelines.index.__main__ import main as index
from pipelines.infra.storage import open_uri
from pipelines.train.run import check_inputs
from tests.conftest import S3
from tests.support.keys import keys_of
from tests.support.runs import run_config
from tests.support.shards import parquet_of, tar_of

BATCH = 8
LOOK: dict[str, Any] = {"hr_crop_size": 64, "scale": 4, "degradation": DegradationConfig()}


def indexed_shards(s3: S3, photos: dict[str, bytes]) -> Pictures:
    """Five photographs in two tars, beside captions, and a Parquet file."""
    names = sorted(photos)
    captions = {f"{name}.txt": b"caption" for name in names}
    some = [{name: photos[name] for name in names[number::3]} for number in range(3)]
    shards = {
        "0.tar": tar_of(captions | some[0], tarfile.PAX_FORMAT),
        "1.tar": tar_of(captions | some[1], tarfile.GNU_FORMAT),
        "2.parquet": parquet_of(some[2]),
    }
    uri = s3.make_bucket("shards", {f"shards/{name}": data for name, data in shards.items()})
    assert index([f"{uri}/shards"]) == 0
    return find_pictures(f"{uri}/shards.index")


def samples(pictures: Pictures, skip: int, num_workers: int) -> dict[int, tuple[str, bytes]]:
    """What all workers get together, until sample 64: key and hr."""
    stream = train_stream(
        pictures,
        seed=1,
        skip=skip,
        total=8 * BATCH,
        global_batch_size=BATCH,
        num_workers=num_workers,
        order="sharded",
        **LOOK,
    )
    shards = stream.streaming_split(num_workers, equal=True)
    with ThreadPoolExecutor(num_workers) as pool:
        parts = pool.map(lambda shard: list(shard.iter_batches(batch_size=BATCH // num_workers)), shards)
        batches = [batch for part in parts for batch in part]
    assert {problem for batch in batches for problem in batch["problem"]} == {""}
    return {
        int(number): (str(key), hr.tobytes())
        for batch in batches
        for number, key, hr in zip(batch["sample"], batch["key"], batch["hr"], strict=True)
    }


def test_shards_are_indexed_and_streamed_on_any_workers(
    ray_session: None, s3: S3, photos: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = indexed_shards(s3, photos)
    assert "5 pictures indexed, 0 quarantined, 10 other files" in capsys.readouterr().out
    keys = keys_of(pictures)
    assert [key.partition("/")[0] for key in keys] == [*["0.tar"] * 2, *["1.tar"] * 2, "2.parquet"]
    check_images(pictures, hr_crop_size=64)
    alone = samples(pictures, 0, 1)
    assert list(alone) == list(range(8 * BATCH))
    assert samples(pictures, 3 * BATCH, 2) == {n: alone[n] for n in range(3 * BATCH, 8 * BATCH)}
    held_out = val_samples(pictures, num_draws=1, **LOOK)
    assert [row["key"] for row in held_out] == keys

    file_system, root = open_uri(pictures.folder)
    for shard in ("1.tar", "2.parquet"):
        file_system.delete_file(f"{root}/{shard}")
    stream = train_stream(
        pictures, seed=1, skip=0, total=2 * BATCH, global_batch_size=BATCH, num_workers=1, **LOOK
    )
    problems = {str(row["key"])[0]: str(row["problem"]) for row in stream.iter_rows()}
    gone = {shard[0]: f"{root}/{shard} does not exist. Check the path." for shard in ("1.tar", "2.parquet")}
    assert problems == {"0": ""} | gone


def test_an_order_that_needs_shards_is_refused_without(s3: S3, bucket: str, tmp_path: Path) -> None:
    config = run_config(bucket, tmp_path, "data.order=sharded")
    with pytest.raises(ConfigError, match=r"has pictures outside of shards\. Pack them with `python -m"):
        check_inputs(config)
