"""CPU time of reading pictures from S3, by client: `python -m tests.benchmarks.fetch`.

An S3 server (moto) runs in another process; what is measured is the time of this one, user and system. Eight
threads read, as in a data task.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np

from pipelines.infra import s3
from pipelines.infra.s3 import s3_client
from pipelines.infra.storage import open_uri, read_bytes, read_range

THREADS = 8


def serve(pipe: Connection) -> None:
    """Runs a server until a message comes; sends its address first."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    pipe.send("http://{}:{}".format(*server.get_host_and_port()))
    pipe.recv()
    server.stop()


def cpu_s() -> float:
    """CPU time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reads", type=int, default=400, help="per client and round; default %(default)s")
    parser.add_argument("--kilobytes", type=int, default=50, help="size of a picture; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": ours.recv(),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = s3_client()
    client.create_bucket(Bucket="photos")
    data = np.random.default_rng(0).bytes(1000 * arguments.kilobytes)
    for number in range(16):
        client.put_object(Bucket="photos", Key=f"{number}.jpg", Body=data)
    file_system, root = open_uri("s3://photos")
    store = s3._store("photos")

    def by_pyarrow(key: str) -> bytes:
        with file_system.open_input_file(f"{root}/{key}") as file:
            return file.read()

    forms: dict[str, Callable[[str], bytes]] = {
        "pyarrow": by_pyarrow,
        "boto3": lambda key: client.get_object(Bucket="photos", Key=key)["Body"].read(),
        "obstore": lambda key: bytes(store.get(key).bytes()),
        "read_bytes": lambda key: read_bytes(file_system, f"{root}/{key}"),
        "read_range": lambda key: read_range(file_system, f"{root}/{key}", 0, len(data)),
    }
    keys = [f"{number % 16}.jpg" for number in range(arguments.reads)]
    used: dict[str, list[float]] = {name: [] for name in forms}
    with ThreadPoolExecutor(THREADS) as pool:
        for turn in range(arguments.rounds + 1):
            for name, form in forms.items():
                before = cpu_s()
                assert all(len(one) == len(data) for one in pool.map(form, keys))
                if turn:  # the first connects
                    used[name].append(1e3 * (cpu_s() - before) / len(keys))
    print(f"{arguments.kilobytes} KB a picture, {THREADS} threads; ms of a core a picture")
    print(f"{'':12}{'median':>8}{'min':>8}{'max':>8}")
    for name, values in used.items():
        print(f"{name:12}{statistics.median(values):>8.3f}{min(values):>8.3f}{max(values):>8.3f}")
    ours.send("stop")
    server.join()


if __name__ == "__main__":
    main()
