"""What a training and its servers hold at one moment, from /proc, the database and the proxy."""

import os
import sqlite3
from collections import defaultdict
from contextlib import closing, suppress
from pathlib import Path

import boto3

from tests.benchmarks.memory import processes
from tests.drill.world import BUCKET, World
from tests.soak.curves import Held, Sample

_KINDS = {
    "ray::RayTrainWorker": "training workers",
    "ray::": "other Ray workers",
    "gcs/gcs_server": "GCS",
    "raylet/raylet": "raylets",
    "ray/": "Ray's other servers",
    "mlflow": "MLflow",
}
"""Kinds of process, by the first of these that is in the command line."""


def watch(there: World, command: int, minute: float) -> Sample:
    """A sample.

    Args:
        there: The servers and nodes.
        command: Process that trains, the driver.
        minute: Since the beginning of the soak.
    """
    held: dict[str, Held] = defaultdict(Held)
    shared_mb = 0.0
    for pid in processes(os.getpid()):
        with suppress(OSError):  # ended in the meantime
            one, its_shared_mb = read(pid)
            shared_mb += its_shared_mb
            if kind := "driver" if pid == command else kind_of(pid):
                held[kind] += one
    with closing(sqlite3.connect(f"file:{there.folder}/mlflow.db?mode=ro", uri=True)) as database:
        ((step,),) = database.execute("SELECT max(step) FROM latest_metrics").fetchall()
        ((rows,),) = database.execute("SELECT count(*) FROM metrics").fetchall()
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET.removeprefix("s3://"))
    return Sample(
        minute,
        dict(held),
        shared_mb,
        stored=sum(page["KeyCount"] for page in pages),
        step=step,
        rows=rows,
        requests=sum(there.proxy.counts.values()),
    )


def read(pid: int) -> tuple[Held, float]:
    """What a process holds, and its share of memory that it shares with others, in MB."""
    kb = {"Pss_Anon": 0, "Pss_Shmem": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in kb:
            kb[name] = int(rest.split()[0])
    files, threads = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task"))
    return Held(kb["Pss_Anon"] / 1e3, files, threads, 1), kb["Pss_Shmem"] / 1e3


def kind_of(pid: int) -> str:
    """Kind of a process; empty for the store, this process and the small programs that start others."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return next((kind for mark, kind in _KINDS.items() if mark in command), "")
