"""Training on tars in a bucket, through the commands and Ray, as users do."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ctmsr.degradation.recipe import DegradationConfig
from ctmsr.errors import ConfigError
from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.stream import check_images, train_stream, val_samples
from pipelines.index.__main__ import main as index
from pipelines.infra.storage import open_uri
from pipelines.train.run import check_inputs
from tests.conftest import S3, Store
from tests.support.keys import keys_of
from tests.support.runs import run_config
from tests.support.shards import tar_of

BATCH = 8
LOOK: dict[str, Any] = {"hr_crop_size": 64, "scale": 4, "degradation": DegradationConfig()}


def indexed_tars(store: Store, photos: dict[str, bytes]) -> Pictures:
    """Five photographs in two tars, beside captions."""
    names = sorted(photos)
    uri = store(
        {
            f"tars/{number}.tar": tar_of(
                {f"{name}.txt": b"caption" for name in names}
                | {name: photos[name] for name in names[number::2]},
                kind,
            )
            for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
        }
    )
    assert index([f"{uri}/tars"]) == 0
    return find_pictures(f"{uri}/tars.index")


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


def test_tars_are_indexed_and_streamed_on_any_workers(
    ray_session: None, store: Store, photos: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    tars = indexed_tars(store, photos)
    assert "5 pictures indexed, 0 quarantined, 10 other files" in capsys.readouterr().out
    assert sorted(key.partition("/")[2] for key in keys_of(tars)) == sorted(photos)
    check_images(tars, hr_crop_size=64)
    alone = samples(tars, 0, 1)
    assert list(alone) == list(range(8 * BATCH))
    assert samples(tars, 3 * BATCH, 2) == {n: alone[n] for n in range(3 * BATCH, 8 * BATCH)}
    held_out = val_samples(tars, num_draws=1, **LOOK)
    assert sorted(row["key"] for row in held_out.iter_rows()) == sorted(keys_of(tars))

    file_system, root = open_uri(tars.folder)
    file_system.delete_file(f"{root}/1.tar")
    stream = train_stream(
        tars, seed=1, skip=0, total=2 * BATCH, global_batch_size=BATCH, num_workers=1, **LOOK
    )
    problems = {str(row["key"])[0]: str(row["problem"]) for row in stream.iter_rows()}
    assert problems == {"0": "", "1": f"{root}/1.tar does not exist. Check the path."}


def test_an_order_that_needs_shards_is_refused_without(s3: S3, bucket: str, tmp_path: Path) -> None:
    config = run_config(bucket, tmp_path, "data.order=sharded")
    with pytest.raises(ConfigError, match=r"has pictures outside of shards\. Pack them with `python -m"):
        check_inputs(config)
