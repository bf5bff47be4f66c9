"""Training from tars beside training from files: `python -m tests.benchmarks.shards`.

First the requests to the store that a sample costs, counted by a proxy: of photographs as files, of the same
in tars in the global and in the sharded order, and in a Parquet file. Then images/s, the ways taking turns,
with the same number of processes on the same cores: from bytes in memory, from files, from tars, and by
webdataset from the same tars (`pip install '.[bench]'`), which reads each from beginning to end and keeps a
thousand samples to choose from. The store and the consumer share the last core. The ratio at the end is that
of medians, sharded to memory.
"""

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from torch.utils.data import DataLoader

from ctmsr.rng import Order
from pipelines.data.pictures import Pictures, find_pictures
from pipelines.data.reading import read_pictures, wanted
from pipelines.data.sample_order import SampleOrder
from pipelines.index.pack import pack
from pipelines.index.run import build_index
from pipelines.index.scan import Settings
from pipelines.infra.storage import open_uri, read_bytes
from tests.support.keys import keys_of
from tests.support.servers.fault_proxy import fault_proxy

from .store import bucket
from .stream import BATCH, from_memory, from_stream, measure, pin, rate, sample, show, start_ray

SHUFFLED = 1000
"""Samples that webdataset keeps to choose from, as its documents do."""


def prepare(uri: str, tar_mb: float) -> dict[str, Pictures]:
    """Photographs of a bucket as files, in tars and in a Parquet file, each with an index."""
    boto3.client("s3").create_bucket(Bucket="made")
    build_index(Settings(uri, "", 32), "s3://made/files.index")
    pack("s3://made/files.index", "s3://made/tars", shard_bytes=int(1e6 * tar_mb), min_side=32)
    files = find_pictures("s3://made/files.index")
    file_system, root = open_uri(uri)
    data = [read_bytes(file_system, f"{root}/{key}") for key in keys_of(files)]
    rows = pa.table({"image": pa.array([{"bytes": one} for one in data])})
    s3, path = open_uri("s3://made/parquet/all.parquet")
    pq.write_table(rows, path, filesystem=s3, row_group_size=100)
    build_index(Settings("s3://made/parquet", "", 32), "s3://made/parquet.index")
    indexes = {"files": "files", "tars": "tars", "Parquet": "parquet"}
    return {name: find_pictures(f"s3://made/{index}.index") for name, index in indexes.items()}


def read_samples(endpoint: str, pictures: Pictures, order: Order, batch: int) -> tuple[int, int]:
    """Reads what the tasks of one worker read; returns samples and bytes of their pictures."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    plan = SampleOrder(pictures, 0, 0, max(len(pictures), 4 * 224), batch, 1, order=order)
    num_samples = num_bytes = 0
    for task in plan.get_read_tasks(1):
        (block,) = task.read_fn()
        columns = {name: block[name].to_numpy() for name in block.column_names}
        for _, files in read_pictures(wanted(columns, range(len(block))), pictures.places):
            assert not isinstance(files, str), files
            num_samples, num_bytes = num_samples + 1, num_bytes + sum(len(file) for _, file in files)
    return num_samples, num_bytes


def requests_per_sample(pictures: Pictures, order: Order, batch: int) -> tuple[float, float]:
    """Requests, and bytes read over bytes wanted, of a process that knows the store by its proxy only."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], {}) as proxy:
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            num_samples, num_bytes = pool.apply(read_samples, (proxy.endpoint, pictures, order, batch))
        return proxy.counts["ok"] / num_samples, proxy.num_bytes / num_bytes


def from_webdataset(urls: list[str], cores: list[int], num_warm: int, num_timed: int) -> float:
    """Images/s of a DataLoader on webdataset."""
    import webdataset

    data = webdataset.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, empty_check=False, seed=0)
    samples = data.shuffle(SHUFFLED).map(_made).repeat()
    loader = DataLoader(
        samples,
        batch_size=BATCH,
        num_workers=min(len(cores), len(urls)),
        worker_init_fn=partial(_pin_worker, cores=cores),
        multiprocessing_context="spawn",
    )
    return rate(iter(loader), num_warm, num_timed)


def _made(found: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    return sample(found["jpg"], str(found["__key__"]), 0)


def _pin_worker(number: int, cores: list[int]) -> None:
    pin([cores[number]])


def urls_of(pictures: Pictures) -> list[str]:
    """Addresses of the tars that need no credentials."""
    name, _, folder = pictures.folder.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    keys = sorted({key.partition("/")[0] for key in keys_of(pictures)})
    params = [{"Bucket": name, "Key": f"{folder}/{key}"} for key in keys]
    return [client.generate_presigned_url("get_object", Params=one, ExpiresIn=86_400) for one in params]


def rows_of_requests(indexes: Mapping[str, Pictures]) -> Iterator[str]:
    """A line for each form, order and size of the batch."""
    orders: dict[str, tuple[Order, ...]] = {
        "files": ("global",),
        "tars": ("global", "sharded"),
        "Parquet": ("sharded",),
    }
    for name, pictures in indexes.items():
        for order in orders[name]:
            for batch in (BATCH, 2 * BATCH):
                requests, share = requests_per_sample(pictures, order, batch)
                yield f"{name + ', ' + order:18}{batch:>7}{requests:>18.3f}{share:>20.2f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=4000, help="photos in the bucket; default %(default)s")
    parser.add_argument(
        "--side", type=int, default=384, help="side of a photo in pixels; default %(default)s"
    )
    parser.add_argument("--tar-mb", type=float, default=32, help="size of a tar; default %(default)s")
    parser.add_argument("--images", type=int, default=4000, help="timed per round; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    arguments = parser.parse_args()
    *cores, last = sorted(os.sched_getaffinity(0))
    pin([last])
    num_warm, num_timed = 480, arguments.images
    with bucket(arguments.photos, arguments.side) as uri:
        start_ray(cores)
        indexes = prepare(uri, arguments.tar_mb)
        print(f"{'':18}{'batch':>7}{'requests/sample':>18}{'bytes read/wanted':>20}")
        for line in rows_of_requests(indexes):
            print(line, flush=True)
        file_system, root = open_uri(uri)
        some = keys_of(indexes["files"])[:400]
        files = {key: read_bytes(file_system, f"{root}/{key}") for key in some}
        stream = partial(from_stream, num_warm=num_warm, num_timed=num_timed)
        forms: dict[str, Callable[[], float]] = {
            "bytes in memory": partial(from_memory, files, cores, num_timed),
            "files": partial(stream, indexes["files"]),
            "tars, global": partial(stream, indexes["tars"]),
            "tars, sharded": partial(stream, indexes["tars"], order="sharded"),
            "webdataset": partial(from_webdataset, urls_of(indexes["tars"]), cores, num_warm, num_timed),
        }
        rates = measure(forms, arguments.rounds)
        ray.shutdown()
    show(rates, cores, arguments.side, files)
    sharded = statistics.median(rates["tars, sharded"])
    print(f"ratio {sharded / statistics.median(rates['bytes in memory']):.2f}")


if __name__ == "__main__":
    main()
