"""What each release wrote is read, and what a newer one wrote is refused by name, before anything is decided.

What was written before there were releases is read in test_before_rooms.py.
"""

import json
import sqlite3
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ctmsr.errors import CheckpointError, TrackingError
from ctmsr.model import checkpoint
from pipelines.data.pictures import find_pictures
from pipelines.infra.checkpoints import STARTER, fetched, find
from pipelines.register.promotion import rollback, settle
from pipelines.tracking.models import FORMAT, MODEL_FORMAT, fetched_version, find_version
from pipelines.tracking.runs import connect
from tests.support.keys import keys_of
from tests.support.registering import register_stated, write_checkpoint
from tests.support.repository import FIXTURES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What release 0.1 left in a folder: see tests/fixtures/release_0_1/make.py."""
    folder = tmp_path_factory.mktemp("release")
    with tarfile.open(FIXTURES / "release_0_1/world.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for name in ("mlflow.sql", "photos.index/summary.json", "tars.index/summary.json"):
        file = folder / name
        file.write_text(file.read_text().replace("/release-0.1", str(folder)))
    sqlite3.connect(folder / "mlflow.db").executescript((folder / "mlflow.sql").read_text()).close()
    return folder


@pytest.fixture
def uri(world: Path) -> str:
    return f"sqlite:///{world}/mlflow.db"


@pytest.mark.parametrize(("name", "number"), [("photos", 1), ("tars", 2)])
def test_an_index_of_release_0_1_is_read(world: Path, name: str, number: int) -> None:
    index = f"{world}/{name}.index"
    assert json.loads(Path(index, "summary.json").read_text())["format"] == number
    names = {key.rpartition("/")[2] for key in keys_of(find_pictures(index))}
    assert names == {"astronaut.jpg", "coffee.jpg"}


def test_the_checkpoint_of_release_0_1_is_read() -> None:
    with fetched(STARTER) as folder:
        model, manifest = checkpoint.load_model(folder)
        assert json.loads((folder / checkpoint.MANIFEST_FILE).read_text())["format_version"] == 1
    assert manifest.config["network"]["scale"] == 4
    assert not model.training


def test_a_model_of_release_0_1_gives_the_same_picture(world: Path, uri: str) -> None:
    picture = np.random.default_rng(1).integers(0, 2**16, (11, 19, 3), np.uint16)
    predicted = find_version(uri, "models:/toy@champion").load()(picture, 0)
    expected = np.load(world / "predicted.npy")
    assert predicted.dtype == expected.dtype == np.uint16
    assert np.abs(predicted.astype(int) - expected).max() <= 64  # of 65 535: other cores round differently


def test_a_registry_with_a_newer_model_is_left_as_it_is(uri: str, tmp_path: Path) -> None:
    client, newer = connect(uri), str(MODEL_FORMAT + 1)
    client.set_model_version_tag("toy", "1", FORMAT, newer)
    try:
        refused = pytest.raises(
            TrackingError, match=r"models:/toy/1 has format 3, .* a newer release\. Upgrade"
        )
        with refused:
            find_version(uri, "models:/toy@champion")
        with refused, fetched_version(uri, "models:/toy/1"):
            pass
        with refused:
            settle(client, "toy")
        with refused:
            rollback(uri, "toy")
        with refused:
            register_stated(uri, write_checkpoint(tmp_path / "c", 0))
        assert len(client.search_model_versions("name='toy'")) == 1
    finally:
        client.set_model_version_tag("toy", "1", FORMAT, str(MODEL_FORMAT))


def test_a_run_of_a_newer_release_is_not_resumed(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "run/checkpoint_000000003-00000000", 0) / checkpoint.MANIFEST_FILE
    assert find(f"{tmp_path}/run").step == 3
    file.write_text(json.dumps({"format_version": 2, "parts": []}))  # nothing else that this release knows
    with pytest.raises(CheckpointError, match=r"checkpoint_000000003-00000000 has format 2, .* Upgrade"):
        find(f"{tmp_path}/run")
