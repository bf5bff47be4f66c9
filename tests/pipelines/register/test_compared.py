"""Models, runs and trials can be compared in MLflow: by score, on which pictures, and by eye."""

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ctmsr.metrics.scoring import Evaluation
from pipelines.data.held_out import find_held_out
from pipelines.evaluate.run import log_scores
from pipelines.infra.storage import write_bytes
from pipelines.tracking.evaluations import PictureSet, log_evaluation, log_sets
from pipelines.tracking.runs import connect, ensure_experiment, preflight, tracked_run
from tests.support.registering import register_stated, write_checkpoint
from tests.support.runs import changed, run_config, sets_of
from tests.support.runs import write_checkpoint as write_trained


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return preflight(f"sqlite:///{tmp_path_factory.mktemp('compared')}/mlflow.db")


def test_models_are_listed_by_their_score_on_a_set_of_pictures(uri: str, tmp_path: Path) -> None:
    for seed, (name, lpips) in enumerate({"worse": 0.4, "better": 0.3}.items()):
        register_stated(uri, write_checkpoint(tmp_path / name, seed, lpips=lpips))
    client = connect(uri)
    experiment = client.get_experiment_by_name("toy")
    assert experiment
    on_set = {"dataset_name": "bucket/val", "dataset_digest": "a"}
    order = [{"field_name": "metrics.val_lpips", "ascending": True, **on_set}]
    models = client.search_logged_models([experiment.experiment_id], order_by=order)
    scores = [{one.key: one.value for one in model.metrics or []} for model in models]
    assert [one["val_lpips"] for one in scores] == [0.3, 0.4]
    assert {one["val_bicubic_lpips"] for one in scores} == {0.95}
    for model in models:
        assert {(one.dataset_name, one.dataset_digest) for one in model.metrics or []} == {
            ("bucket/val", "a")
        }
        assert {
            "step": "3",
            "schedule.sigma_max": "0.9",
            "network.lq_size": "16",
        }.items() <= model.params.items()
        run = client.get_run(str(model.source_run_id))
        used = sets_of(run)["evaluation"]
        assert (used.digest, json.loads(used.source)) == ("a", {"uri": "s3://bucket/val"})
        version = client.get_model_version("toy", "1" if run.data.metrics["val_lpips"] == 0.4 else "2")
        assert version.source == model.artifact_location


def test_a_table_shows_every_sample_once(uri: str) -> None:
    samples = tuple(np.full((8, 24 + 8 * number, 3), 40 * number, np.uint8) for number in range(2))
    rows = [{"key": f"{number}.png", "lpips": number / 4, "bicubic_lpips": 0.5} for number in range(3)]
    evaluation = Evaluation(rows, np.zeros((16, 32, 3), np.uint8), samples)
    client, experiment_id = connect(uri), ensure_experiment(uri, "table")
    with tracked_run(uri, experiment_id, "table", params={}, tags={}) as run_id:
        for _ in range(2):  # the same evaluation again
            pictures = PictureSet("photos/test", "f00d", "evaluation")
            log_evaluation(client, run_id, evaluation, pictures, step=7, prefix="test_")
    found = pd.read_json(client.download_artifacts(run_id, "evaluation/f00d-7.json"), orient="split")
    assert found["picture"].tolist() == ["0.png", "1.png"]
    assert found["lpips"].tolist() == [0.0, 0.25]
    for entry, sample_u8 in zip(found["LR | bicubic | ours | HR"], samples, strict=True):
        data = Path(client.download_artifacts(run_id, entry["filepath"])).read_bytes()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), sample_u8)
    run = client.get_run(run_id)
    assert run.data.metrics == {"test_lpips": 0.25, "test_bicubic_lpips": 0.5}
    assert list(sets_of(run)) == ["evaluation"]


def test_runs_that_start_at_once_all_name_the_same_pictures(uri: str) -> None:
    client, experiment_id = connect(uri), ensure_experiment(uri, "at once")
    runs = [client.create_run(experiment_id).info.run_id for _ in range(8)]
    together, pictures = threading.Barrier(len(runs)), PictureSet("photos/train", "cafe", "training")

    def log(run_id: str) -> None:
        together.wait()
        log_sets(uri, run_id, [pictures])

    with ThreadPoolExecutor(len(runs)) as threads:
        list(threads.map(log, runs))
    assert {sets_of(client.get_run(run_id))["training"].digest for run_id in runs} == {"cafe"}


@pytest.mark.parametrize("is_up", [True, False])
def test_an_evaluation_is_told_to_the_run_or_else_warned_of(
    is_up: bool, uri: str, photos: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, data in photos.items():
        write_bytes(f"{tmp_path}/photos/{name}", data)
    config = changed(
        run_config(str(tmp_path), tmp_path, f"experiment=told-{is_up}"),
        f"tracking_uri={uri if is_up else 'http://127.0.0.1:9'}",
    )
    write_trained(config, checkpoint_uri := f"{config.run_uri}/checkpoint_000000003-00000000")
    experiment_id, tags = ensure_experiment(uri, config.experiment), {"storage": config.run_uri}
    with tracked_run(uri, experiment_id, config.name, params={}, tags=tags) as run_id:
        pass
    held_out, scores = find_held_out(config.data), {"key": "a", "lpips": 0.3, "bicubic_lpips": 0.5}
    log_scores(config, checkpoint_uri, held_out, Evaluation([scores], np.zeros((8, 8, 3), np.uint8)))
    told = connect(uri).get_run(run_id)
    if is_up:
        assert told.data.metrics == {"test_lpips": 0.3, "test_bicubic_lpips": 0.5}
        assert sets_of(told)["evaluation"].digest == held_out.version(config)
    else:
        assert told.data.metrics == {}
        assert "the MLflow server http://127.0.0.1:9 does not answer" in caplog.text
