"""Training on Ray: what a run leaves behind, and how it ends, goes on and fails."""

import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.train
import torch
from ray.util.state import list_tasks

from ctmsr.config import to_dict
from ctmsr.errors import UserError
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.model import checkpoint
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from ctmsr.training.state import build_state, restore_state
from ctmsr.training.step import Batch, train_step
from pipelines.data.held_out import HeldOut, find_held_out
from pipelines.data.pictures import find_pictures
from pipelines.evaluate.__main__ import main as evaluate_main
from pipelines.evaluate.run import evaluate
from pipelines.infra.checkpoints import fetched, find, newest
from pipelines.infra.storage import open_uri
from pipelines.register.__main__ import main as register_main
from pipelines.tracking.models import load_model
from pipelines.tracking.runs import connect
from pipelines.train.__main__ import main as train_main
from pipelines.train.run import check_inputs
from tests.conftest import S3
from tests.support.monitoring import metrics as monitored
from tests.support.runs import (
    TOTAL_STEPS,
    Trained,
    changed,
    files_of,
    kill_a_worker,
    run_config,
    run_named,
    run_to_end,
    sets_of,
    steps_of,
)


def test_a_run_ends_with_a_checkpoint_of_its_last_step(trained: Trained) -> None:
    assert find(trained.config.run_uri).uri == trained.outcome.checkpoint_uri
    with fetched(trained.outcome.checkpoint_uri) as folder:
        model, manifest = checkpoint.load_model(folder)
        state = checkpoint.load_train_state(folder)
    assert manifest.config == to_dict(trained.config)
    assert manifest.meta["metrics"] == trained.outcome.metrics
    assert manifest.meta["step"] == int(state["global_step"]) == TOTAL_STEPS
    weights = model.state_dict()
    assert any(not torch.equal(weights[name], state[f"model.{name}"]) for name in weights)  # EMA differs
    assert any(name.startswith("dtm.") for name in state)


def test_a_run_tells_mlflow_how_it_went(trained: Trained) -> None:
    client = connect(trained.config.tracking_uri)
    told = client.get_run(trained.outcome.run_id)
    assert told.info.status == "FINISHED"
    assert told.data.params["schedule.sigma_max"] == str(trained.config.schedule.sigma_max)
    steps = {name: steps_of(client, told, name) for name in ("loss", "dtm_loss", "images_per_s", "val_lpips")}
    assert steps == {
        "loss": [4, 8, 12],
        "dtm_loss": [12],
        "images_per_s": [4, 8, 12],
        "val_lpips": [4, 8, 12],
    }
    assert told.data.metrics["val_lpips"] == pytest.approx(trained.outcome.metrics["lpips"])
    assert told.data.metrics["images_per_s"] > 0
    assert any("val" in file.path for file in client.list_artifacts(told.info.run_id, "images"))
    # The same pictures are held out here, so there is one set.
    assert (
        sets_of(told)["training"].digest == told.data.tags["train_version"] == told.data.tags["val_version"]
    )


def test_pictures_are_read_and_degraded_by_ray_data_tasks(trained: Trained) -> None:
    address = ray.get_runtime_context().gcs_address  # this session's, whatever else runs on the machine
    tasks = list_tasks(address, limit=1000, filters=[("state", "=", "FINISHED")], detail=False)
    names = [task.name for task in tasks]
    assert any("MapBatches(_make_rows)" in name for name in names), sorted(set(names))


def test_a_finished_run_started_again_ends_at_once(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    again = run_to_end(trained.config)
    assert again.checkpoint_uri == trained.outcome.checkpoint_uri
    assert again.metrics == trained.outcome.metrics
    assert train_main(trained.options) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = ["reading", "5", "PSNR-Y", "bicubic", "first", "checkpoint:", "next:"]
    assert [line.split()[0] for line in lines] == starts
    assert lines[1] == "5 pictures to train on, 5 held out"


def test_ray_s_public_api_finds_the_checkpoints_and_a_plain_script_goes_on(trained: Trained) -> None:
    file_system, folder = open_uri(trained.config.run_uri)
    result = ray.train.Result.from_path(folder, file_system)
    assert result.checkpoint
    assert trained.outcome.checkpoint_uri.endswith(result.checkpoint.path)
    assert result.metrics == trained.outcome.metrics | {
        "step": TOTAL_STEPS,
        "minus_lpips": -trained.outcome.metrics["lpips"],
    }
    assert result.best_checkpoints
    lpips = {metrics["step"]: metrics["lpips"] for _, metrics in result.best_checkpoints}
    best = result.get_best_checkpoint("lpips", "min")
    assert sorted(lpips) == [4, 8, 12]
    assert best
    with best.as_directory() as copy:
        model, manifest = checkpoint.load_model(Path(copy))
        saved = checkpoint.load_train_state(Path(copy))
    assert manifest.meta["metrics"]["lpips"] == min(lpips.values())
    state = build_state(ConsistencyModel(model.config), trained.config.optim)
    restore_state(state, model, saved)
    hr_u8 = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(hr_u8, hr_u8[:, ::4, ::4], samples=[0, 1], keys=["a", "b"], share=1.0)
    losses = train_step(state, batch, trained.config.recipe, load_lpips("vgg"))
    assert losses["loss"].isfinite()
    assert state.global_step == manifest.meta["step"] + 1


def test_evaluate_compares_the_run_with_bicubic(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(trained.options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["PSNR-Y", "bicubic", "ours", "protocol:", "written:"]
    # the held-out pictures are those of data.val_uri here, so the scores are the run's own
    evaluation = evaluate(trained.config, trained.outcome.checkpoint_uri, find_held_out(trained.config.data))
    assert evaluation.means.keys() - trained.outcome.metrics.keys() == {"dists", "bicubic_dists"}
    own = {name: evaluation.means[name] for name in trained.outcome.metrics}
    assert own == pytest.approx(trained.outcome.metrics, abs=1e-4)
    told = connect(trained.config.tracking_uri).get_run(trained.outcome.run_id)
    assert told.data.metrics["test_lpips"] == pytest.approx(evaluation.means["lpips"], abs=1e-4)
    expected = find_held_out(trained.config.data).version(trained.config)
    assert sets_of(told)["evaluation"].digest == expected


def test_register_releases_the_bytes_of_the_checkpoint(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """After twelve steps it is worse than bicubic, and the command says what that means."""
    assert register_main(trained.options) == 0
    printed, name = capsys.readouterr().out, trained.config.model_name
    assert f"models:/{name}@challenger is version 1, from {trained.outcome.checkpoint_uri}" in printed
    said = re.search(r"not promoted: worse than bicubic: lpips (\S+) against ([0-9.]+);", printed)
    assert said
    metrics = trained.outcome.metrics
    expected = [metrics["lpips"], metrics["bicubic_lpips"]]
    assert [float(text) for text in said.groups()] == pytest.approx(expected, abs=2e-4)
    assert f"{name} has no champion: upscale and serve keep using the starter model." in printed
    assert printed.rstrip().endswith(f"--model models:/{name}@challenger")
    released = load_model(trained.config.tracking_uri, f"models:/{name}@challenger")
    lq_u8 = np.random.default_rng(0).integers(0, 256, (1, 20, 24, 3), np.uint8)
    with fetched(trained.outcome.checkpoint_uri) as folder:
        model, _ = checkpoint.load_model(folder)
    sigma_max, inference = trained.config.schedule.sigma_max, trained.config.inference
    sr_u8 = upscale(model, lq_u8[0], sigma_max=sigma_max, config=inference, seed=5)
    assert np.array_equal(released.predict(lq_u8, params={"seed": 5}), sr_u8[None])


def gauges_of(name: str, ended: threading.Event) -> dict[str, float]:
    """What Prometheus would collect of a run from the node while it is under way."""
    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    line = re.compile(rf'ray_ctmsr_(\w+){{[^}}]*run="{name}"[^}}]*}} (\S+)')
    seen = dict[str, float]()
    while not ended.wait(0.5):
        with urllib.request.urlopen(page, timeout=10) as answer:
            seen.update((key, float(value)) for key, value in line.findall(answer.read().decode()))
    return seen


def test_a_run_that_lost_a_worker_ends_with_the_same_weights_and_shows_in_ray_s_metrics(
    trained: Trained,
) -> None:
    config = replace(trained.config, name="interrupted", train=replace(trained.config.train, max_failures=1))
    inputs, ended, started = check_inputs(config), threading.Event(), time.time()

    def kill_after_a_checkpoint() -> None:
        deadline = time.monotonic() + 100
        while newest(config.run_uri) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        kill_a_worker()

    with ThreadPoolExecutor(2) as threads:
        threads.submit(kill_after_a_checkpoint)
        gauges = threads.submit(gauges_of, config.name, ended)
        try:
            outcome = run_to_end(config, inputs)
        finally:
            ended.set()
    steps = steps_of(connect(inputs.tracking_uri), run_named("interrupted", config), "loss")
    assert steps[0] == 4
    assert 4 not in steps[1:]  # it did not start over
    assert steps[-1] == TOTAL_STEPS
    assert files_of(outcome.checkpoint_uri) == files_of(trained.outcome.checkpoint_uri)
    seen = gauges.result()
    assert seen["images_per_s"] > 0
    assert 0 <= seen["data_wait"] <= 1
    assert (seen["step"], seen["total_steps"], seen["not_finite"]) == (TOTAL_STEPS, TOTAL_STEPS, 0)
    assert started < seen["checkpoint_at_s"] <= seen["step_at_s"] < time.time()
    assert monitored() <= {f"ctmsr_{name}" for name in seen}  # by alerts and dashboard


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_shows_that_it_did(trained: Trained) -> None:
    config = changed(trained.config, "name=diverged", "loss.charbonnier_weight=1e38")
    inputs, ended = check_inputs(config), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        gauges = thread.submit(gauges_of, config.name, ended)
        try:
            with pytest.raises(UserError, match="is not finite"):
                run_to_end(config, inputs)
            time.sleep(3)  # the driver of this test goes on, and reports every second
        finally:
            ended.set()
    assert gauges.result()["not_finite"] == 1


def test_a_picture_that_breaks_after_the_check_ends_the_run_or_is_left_out_as_allowed(
    trained: Trained, s3: S3, photos: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(trained.config.tracking_uri.removeprefix("sqlite:///")).parent
    config = run_config(
        s3.make_bucket("breaking", {f"photos/{k}": v for k, v in photos.items()}),
        folder,
        "name=broken",
        "train.num_workers=1",
        "train.max_failures=3",
    )
    inputs = check_inputs(config)
    s3.client.put_object(Bucket="breaking", Key="photos/coffee.png", Body=photos["coffee.png"][:2000])
    with pytest.raises(
        UserError, match=r"training failed\..*DataError: breaking/photos/coffee\.png"
    ) as raised:
        run_to_end(config, inputs)
    assert "\n" not in str(raised.value)
    assert "Resuming from step" not in capsys.readouterr().out  # no retry of what would fail again
    assert run_named("broken", config).info.status == "FAILED"
    tolerant = replace(config, name="tolerant", data=replace(config.data, max_unreadable=0.5))
    capsys.readouterr()
    intact = replace(inputs, val=find_pictures(trained.config.data.val_uri))
    run_to_end(tolerant, intact)
    assert find(tolerant.run_uri).step == TOTAL_STEPS
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tolerant: starting 1 worker"
    scored = [line.split() for line in lines if line.startswith("tolerant  step ")]
    assert [words[2:4] for words in scored] == [[str(step), "LPIPS"] for step in (4, 8, 12)]
    told = [line for line in lines if line.startswith("warning: skipped")]
    assert told
    assert all("breaking/photos/coffee.png is not a readable picture" in line for line in told)
    with pytest.raises(UserError, match=r"evaluation failed\. DataError: breaking/photos/coffee\.png"):
        evaluate(config, trained.outcome.checkpoint_uri, HeldOut(config.data, inputs.val))
