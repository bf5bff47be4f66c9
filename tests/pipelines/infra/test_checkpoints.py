"""Checkpoints in storage: written beside the training, complete or absent, the last and the best kept."""

import json
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch

from ctmsr.config import to_dict
from ctmsr.errors import CheckpointError, StoreError
from ctmsr.model import checkpoint
from ctmsr.training.state import TrainState, build_state, state_tensors
from pipelines.infra.checkpoints import CheckpointWriter, Stored, fetched, find, newest
from pipelines.infra.storage import list_sizes, open_uri, write_bytes
from tests.conftest import Store
from tests.support.tiny import NETWORK, OPTIM, filled_model

CONFIG = {"network": to_dict(NETWORK)}


def manifest(files: Mapping[str, bytes]) -> bytes:
    sizes = {name: {"bytes": len(data)} for name, data in files.items()}
    return json.dumps({"format_version": 1, "files": sizes, "config": {}, "meta": {}}).encode()


@pytest.fixture(scope="module")
def state() -> TrainState:
    return build_state(filled_model(), OPTIM)


def save(writer: CheckpointWriter, state: TrainState, step: int) -> None:
    writer.save(state, CONFIG, {"step": step})


def folders(run_uri: str) -> list[str]:
    return sorted({path.parts[0] for path in list_sizes(run_uri)})


def test_the_newest_is_the_last_complete_one(store: Store) -> None:
    files = {"model.safetensors": b"weights"}
    whole = files | {"checkpoint.json": manifest(files)}
    uri = store(
        {f"run/checkpoint_1/{name}": data for name, data in whole.items()}
        | {f"run/checkpoint_2/{name}": data for name, data in whole.items()}
        | {"run/checkpoint_3/checkpoint.json": whole["checkpoint.json"]}  # its weights are missing
        | {
            "run/checkpoint_4/checkpoint.json": whole["checkpoint.json"],
            "run/checkpoint_4/model.safetensors": b"w",
        }
        | {"run/checkpoint_5/model.safetensors": b"weights"}
        | {f"run/other/{name}": data for name, data in whole.items()}
    )
    assert newest(f"{uri}/run") == Stored(f"{uri}/run/checkpoint_2", {}, {})
    assert newest(f"{uri}/no-such-run") is None
    with pytest.raises(CheckpointError, match=r"there is no complete checkpoint under .*no-such-run"):
        find(f"{uri}/no-such-run")


def test_what_is_saved_is_the_state_of_that_moment(store: Store, state: TrainState) -> None:
    run_uri = store({}) + "/run"
    expected = {name: value.clone() for name, value in state_tensors(state).items()}
    writer = CheckpointWriter(run_uri)
    save(writer, state, 7)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(1)
    writer.wait()
    found = find(run_uri)
    assert (found.step, found.config) == (7, CONFIG)
    assert found.uri.startswith(f"{run_uri}/checkpoint_000000007-")
    with fetched(found.uri) as folder:
        stored = checkpoint.load_train_state(folder)
    assert stored.keys() == expected.keys()
    assert [name for name in stored if not torch.equal(stored[name], expected[name])] == []


def test_what_was_begun_goes_and_scores_are_added_to_what_is_known(store: Store, state: TrainState) -> None:
    run_uri = store({"run/checkpoint_000000001-dead/model.safetensors": b"cut"}) + "/run"
    writer = CheckpointWriter(run_uri)
    for step in (2, 3):
        save(writer, state, step)
    writer.wait()
    assert [int(name.split("_")[1].split("-")[0]) for name in folders(run_uri)] == [2, 3]
    found = find(run_uri)
    assert found.meta == {"step": 3}
    write_bytes(f"{found.uri}/scores.json", b'{"metrics": {"lpips": 0.25}}')
    assert find(run_uri).meta == {"step": 3, "metrics": {"lpips": 0.25}}
    with fetched(found.uri) as folder:
        assert checkpoint.read_manifest(folder).meta == find(run_uri).meta


@contextmanager
def small_files_only() -> Iterator[None]:
    """Nothing above 100 kB can be written, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_leaves_nothing_behind(store: Store, state: TrainState) -> None:
    run_uri = store({}) + "/run"
    writer = CheckpointWriter(run_uri)
    with small_files_only():
        save(writer, state, 3)
        with pytest.raises(StoreError, match=r"checkpoint of step 3 cannot be written to .*point TMPDIR to"):
            writer.wait()
    assert folders(run_uri) == []
    save(writer, state, 4)
    writer.wait()
    assert find(run_uri).step == 4


def test_a_reader_sees_all_of_a_checkpoint_or_none(store: Store, state: TrainState) -> None:
    run_uri = store({}) + "/run"
    writer = CheckpointWriter(run_uri)
    done = threading.Event()
    seen = set()

    def read() -> None:
        while not done.is_set():
            if found := newest(run_uri):
                with fetched(found.uri) as folder:
                    seen.add((found.step, len(checkpoint.read_manifest(folder).files)))

    reader = threading.Thread(target=read)
    reader.start()
    save(writer, state, 1)
    writer.wait()
    done.set()
    reader.join()
    assert seen <= {(1, 2)}


def test_a_damaged_checkpoint_is_named(store: Store, state: TrainState) -> None:
    run_uri = store({}) + "/run"
    writer = CheckpointWriter(run_uri)
    save(writer, state, 1)
    writer.wait()
    uri = find(run_uri).uri
    file_system, path = open_uri(f"{uri}/model.safetensors")
    with file_system.open_input_file(path) as file:
        data = bytearray(file.read())
    data[-1] ^= 1
    write_bytes(f"{uri}/model.safetensors", bytes(data))
    with (
        pytest.raises(CheckpointError, match=rf"{uri} is damaged: the SHA-256 of model"),
        fetched(uri) as folder,
    ):
        checkpoint.load_model(folder)
