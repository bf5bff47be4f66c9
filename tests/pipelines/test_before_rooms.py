"""What was made before the modules of pipelines/ moved into rooms is read, continued and served as before."""

import io
import json
import logging
import sqlite3
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctmsr.config import from_dict
from ctmsr.errors import ConfigError
from ctmsr.model import checkpoint
from ctmsr.model.network import ConsistencyModel
from ctmsr.training.state import build_state, restore_state, state_tensors
from pipelines.config.run_config import RunConfig
from pipelines.data.pictures import find_pictures
from pipelines.index.__main__ import main as index
from pipelines.infra.checkpoints import fetched, find
from pipelines.infra.progress import progress_line
from pipelines.tracking.models import find_version, load_model
from pipelines.tracking.runs import connect
from pipelines.train.run import check_inputs, train
from pipelines.tune.run import check_search, search
from tests.conftest import S3
from tests.support.keys import keys_of
from tests.support.registering import register_stated, write_checkpoint
from tests.support.repository import FIXTURES
from tests.support.runs import run_named

PLACE = "/before-rooms"
"""Stands in texts for the folder where MLflow's database lay."""


@dataclass(frozen=True)
class World:
    """What commands of before have left: see tests/fixtures/before_rooms/make.py."""

    config: RunConfig
    """Of the run, which was killed after the first of two steps, and of the search."""
    predicted: np.ndarray
    """What the registered model made of a picture."""


@pytest.fixture(scope="module")
def world(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(FIXTURES / "before_rooms/world.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    bucket = folder / "bucket"
    s3.make_bucket(
        "before",
        {str(path.relative_to(bucket)): path.read_bytes() for path in bucket.rglob("*") if path.is_file()},
    )
    dump = (folder / "mlflow.sql").read_text().replace(PLACE, str(folder))
    sqlite3.connect(folder / "mlflow.db").executescript(dump).close()
    config = from_dict(RunConfig, json.loads((bucket / "runs/first/config.json").read_text()))
    return World(
        replace(
            config,
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
            # the only ones there were
            inference=replace(config.inference, noise_version=1),
            data=replace(config.data, order_version=1),
        ),
        np.load(io.BytesIO((folder / "predicted.npy").read_bytes())),
    )


def filled(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights that the run started from: of every tensor sixteen numbers that its name determines."""
    state = ConsistencyModel(config.network).state_dict()
    for name, value in state.items():
        if value.is_floating_point() and not name.endswith("resample_filter"):
            drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(16).astype(np.float32)
            scale = np.sqrt(np.prod(value.shape[1:])) if value.ndim > 1 else 10
            value.copy_(torch.from_numpy(np.resize(drawn / np.float32(scale), tuple(value.shape))))
    return state


def test_an_index_is_read_and_a_scan_knows_its_pictures(
    world: World, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = find_pictures(world.config.data.train_uri)
    assert keys_of(pictures) == ["astronaut.jpg", "coffee.jpg", "rocket.jpg"]
    assert pictures.version == find(world.config.run_uri).meta["train_version"]
    assert index(["s3://before/photos"]) == 0
    assert "scanned 0 pictures" in capsys.readouterr().out
    assert find_pictures(world.config.data.train_uri).version == pictures.version


def test_a_checkpoint_puts_every_tensor_where_it_was(world: World) -> None:
    with fetched(find(world.config.run_uri).uri) as folder:
        model, _ = checkpoint.load_model(folder)
        tensors = checkpoint.load_train_state(folder)
    for name, value in filled(world.config).items():
        if not name.startswith("model.conv_last."):  # all that a step has changed
            assert torch.equal(model.state_dict()[name], value), name
            assert torch.equal(tensors[f"dtm.{name}"], value), name
    state = build_state(ConsistencyModel(world.config.network), world.config.optim)
    restore_state(state, model, tensors)
    assert state.global_step == 1
    again = state_tensors(state)
    assert again.keys() == tensors.keys()
    assert [name for name in again if not torch.equal(again[name], tensors[name])] == []


@pytest.mark.slow
def test_a_run_goes_on(world: World, ray_session: None) -> None:
    before = find(world.config.run_uri)
    with progress_line() as progress:
        outcome = train(world.config, check_inputs(world.config), progress)
    assert (before.step, find(world.config.run_uri).step) == (1, 2)
    assert run_named("first", world.config).info.run_id == outcome.run_id  # there is no other one


def test_a_run_and_a_search_are_taken_for_the_same_but_for_another_noise(world: World) -> None:
    """Both the steps of a run and the scores of a search depend on it."""
    check_inputs(world.config)
    check_search(world.config)
    changed = replace(world.config, inference=replace(world.config.inference, noise_version=2))
    with pytest.raises(ConfigError, match=r"another config \(inference\.noise_version: 1 -> 2\)"):
        check_inputs(changed)
    with pytest.raises(ConfigError, match=r"another search \(inference\.noise_version: 1 -> 2\)"):
        check_search(changed)


def test_a_registered_model_predicts_and_is_measured_against(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = world.config.tracking_uri
    picture = np.random.default_rng(1).integers(0, 256, (11, 19, 3), np.uint8)
    predicted: Any = np.asarray(load_model(uri, "models:/toy@champion").predict(picture))
    assert np.abs(predicted.astype(int) - world.predicted).max() <= 1
    upscale = find_version(uri, "models:/toy@champion").load()
    with caplog.at_level(logging.WARNING):
        deep = upscale(picture.astype(np.uint16) * 257, 0)
    assert np.array_equal(deep, predicted.astype(np.uint16) * 257)
    assert "takes pictures of 8 bits only. Register it again for 16." in caplog.text
    decision = register_stated(uri, write_checkpoint(tmp_path / "worse", 0, lpips=2.0))
    assert (decision.version, decision.champion, decision.is_promoted) == ("2", "1", False)


def test_a_search_finds_its_scores(world: World) -> None:
    told = connect(world.config.tracking_uri).search_runs(["1"], "tags.search = 'true'")
    nobody = None  # nothing runs, so nobody is told
    found = search(world.config, check_search(world.config), nobody)  # type: ignore[arg-type]
    assert sorted(one.trial.name for one in found.trials) == ["trial-000", "trial-001"]
    assert found.trials[0].objective == told[0].data.metrics["objective"]
    assert len(connect(world.config.tracking_uri).search_runs(["1"], "tags.search = 'true'")) == 1


@pytest.mark.slow
def test_a_search_goes_on_with_one_more_trial(world: World, ray_session: None) -> None:
    more = replace(world.config, tune=replace(world.config.tune, num_trials=3))
    inputs = check_search(more)
    with progress_line() as progress:
        found = search(more, inputs, progress)
    assert {one.trial.number: one.step for one in found.trials} == {0: 1, 1: 1, 2: 1}
