"""What an index of a hundred million pictures asks of the planner, and one of ten million of its writer.

`python -m tests.benchmarks.scale` writes synthetic indexes and measures, each in a process of its own: memory
of the process that plans a training stream, size of the plan that is sent to others, and the time until the
first batch comes out of Ray Data, whose rows are empty, as there are no such pictures; then time and memory
to write an index from the results of a scan, and to find near-duplicates; then the index is written again by
processes of which two are killed on the way. The ratio is the planner's memory, large over small.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from ctmsr.degradation.config import DegradationConfig
from pipelines.data.keys import BATCH_ROWS, keys_file, write_keys
from pipelines.data.pictures import SUMMARY_FILE, find_pictures
from pipelines.data.sample_order import SampleOrder
from pipelines.data.stream import train_stream
from pipelines.index.merge import merge
from pipelines.index.near import keepers
from pipelines.index.scan import SCHEMA, Settings, write_table
from pipelines.infra.cluster import ray_cluster

BATCH, WORKERS, NAME = 32, 4, "synthetic"
PART_ROWS = 256


def key_batches(num_pictures: int) -> Iterator[pa.RecordBatch]:
    """Names of 27 bytes."""
    for start in range(0, num_pictures, BATCH_ROWS):
        names = [
            f"{number >> 10:08}/photo-{number:09}.jpg"
            for number in range(start, min(start + BATCH_ROWS, num_pictures))
        ]
        yield pa.record_batch({"key": pa.array(names, pa.large_string())})


def write_index(folder: Path, num_pictures: int) -> str:
    """An index of names alone."""
    folder.mkdir()
    write_keys(key_batches(num_pictures), ["key"], folder / keys_file(NAME))
    (folder / "photos").mkdir()
    summary = {
        "version": NAME,
        "uri": f"{folder}/photos",
        "lq_uri": "",
        "scale": None,
        "pictures": num_pictures,
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))
    return str(folder)


def peak_mb() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def plan(uri: str) -> dict[str, float]:
    """Plans two rounds of a stream, then reads its first batch through Ray Data."""
    before, started = peak_mb(), time.monotonic()
    pictures = find_pictures(uri)
    order = SampleOrder(pictures, 0, 10**7, 10**9, BATCH, WORKERS)
    tasks = order.get_read_tasks(1)
    figures = {"planned, s": time.monotonic() - started, "planner, MB": peak_mb()}
    figures["of which for the plan, MB"] = peak_mb() - before
    figures["pickled, kB"] = len(pickle.dumps((order, [task.metadata for task in tasks]))) / 1e3
    with ray_cluster():
        started = time.monotonic()
        stream = train_stream(
            pictures,
            hr_crop_size=64,
            scale=4,
            degradation=DegradationConfig(),
            seed=0,
            skip=10**7,
            total=10**9,
            global_batch_size=BATCH,
            num_workers=1,
        )
        next(iter(stream.iter_batches(batch_size=BATCH)))
        figures["first batch, s"] = time.monotonic() - started
    return figures


def write_parts(folder: Path, num_pictures: int) -> None:
    """Results of a scan, one picture in a thousand a duplicate."""
    (folder / "parts").mkdir(parents=True)
    for start in range(0, num_pictures, PART_ROWS):
        numbers = np.arange(start, min(start + PART_ROWS, num_pictures))
        same = np.where(numbers % 1000 == 999, numbers - 1, numbers)
        columns = {
            "key": [f"{number >> 10:08}/photo-{number:09}.jpg" for number in numbers],
            "size": numbers + 100_000,
            "etag": [f"{number:032x}" for number in same],
            "width": np.full(len(numbers), 512),
            "height": np.full(len(numbers), 512),
            "format": ["JPEG"] * len(numbers),
            "sha256": [f"{number * 2654435761:064x}" for number in same.tolist()],
            "status": ["ok"] * len(numbers),
            "detail": [""] * len(numbers),
        }
        table = pa.table(
            {
                name: pa.array(columns[name], kind) if name in columns else pa.nulls(len(numbers), kind)
                for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
            }
        )
        write_table(table, str(folder / "parts" / f"{start:012}.parquet"))


def merged(folder: str) -> dict[str, float]:
    """Writes the index of a folder with parts."""
    parts = [str(path) for path in sorted(Path(folder, "parts").iterdir())]
    started = time.monotonic()
    summary = merge(parts, Settings(f"{folder}/photos", "", 128), folder, num_others=0)
    return {"pictures": summary["pictures"], "written, s": time.monotonic() - started, "peak, MB": peak_mb()}


def alike(number: str) -> dict[str, float]:
    """Finds the near-duplicates among as many hashes, of which one in a hundred is two bits from another."""
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, int(number), np.uint64)
    again = len(hashes) // 100
    bits = np.uint64(1) << draw.integers(0, 64, (2, again), np.uint64)
    hashes[-again:] = hashes[:again] ^ bits[0] ^ bits[1]
    before, started = peak_mb(), time.monotonic()
    found = np.count_nonzero(keepers(hashes, 2) != np.arange(len(hashes)))
    took = {"compared, s": time.monotonic() - started, "for that, peak, MB": peak_mb() - before}
    return {"near-duplicates": float(found)} | took


def command(what: str, place: str) -> list[str]:
    """Runs one of the above in a process of its own."""
    return [sys.executable, "-m", "tests.benchmarks.scale", "--measure", what, place]


def apart(what: str, place: str) -> dict[str, float]:
    """What such a process measures."""
    ended = subprocess.run(command(what, place), check=True, stdout=subprocess.PIPE)
    return json.loads(ended.stdout.splitlines()[-1])


def version_of(folder: Path) -> str:
    """Version of the index in a folder; empty if there is none."""
    summary = folder / SUMMARY_FILE
    return json.loads(summary.read_text())["version"] if summary.exists() else ""


def killed_twice(folder: Path, lasts_s: float) -> str:
    """Version of an index whose writing is killed after a third and two thirds of its time, then ends."""
    for path in folder.iterdir():
        if path.name != "parts":
            path.unlink()
    for share in (1 / 3, 2 / 3):
        with subprocess.Popen(command("merged", str(folder)), stdout=subprocess.DEVNULL) as writing:
            time.sleep(share * lasts_s)
            writing.kill()
        if version_of(folder):
            raise RuntimeError("the index was complete before its writing was killed")
    apart("merged", str(folder))
    return version_of(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, nargs=2, default=[10**5, 10**8], help="default %(default)s")
    parser.add_argument("--written", type=int, default=10**7, help="pictures of an index to write")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, place = arguments.measure
        print(json.dumps({"plan": plan, "merged": merged, "alike": alike}[what](place)))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = []
        for number in arguments.pictures:
            figures.append(apart("plan", write_index(Path(folder, f"{number}.index"), number)))
        print(f"{'pictures':28}" + "".join(f"{number:>14}" for number in arguments.pictures))
        for name in figures[0]:
            print(f"{name:28}" + "".join(f"{one[name]:>14.2f}" for one in figures))
        print(f"ratio {figures[1]['planner, MB'] / figures[0]['planner, MB']:.3f}")
        index = Path(folder, "written.index")
        write_parts(index, arguments.written)
        written = apart("merged", str(index)) | apart("alike", str(arguments.written))
        for name, value in written.items():
            print(f"{name:28}{value:>14.1f}")
        version = version_of(index)
        again = killed_twice(index, written["written, s"])
        print(f"version {version}; written again, killed twice on the way: {again}")


if __name__ == "__main__":
    main()
