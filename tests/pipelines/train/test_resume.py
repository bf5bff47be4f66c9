"""A run that stops goes on as if it had not: the same weights to the bit, whatever stopped it."""

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.util.queue import Empty, Queue

from ctmsr.config import to_dict
from ctmsr.errors import CheckpointError, ConfigError, UserError
from ctmsr.image import decode, encode_png
from ctmsr.model import checkpoint
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig
from pipelines.convert.run import export_pth, import_pth
from pipelines.evaluate.__main__ import main as evaluate_main
from pipelines.infra.checkpoints import fetched, find
from pipelines.infra.progress import Progress
from pipelines.infra.storage import list_sizes
from pipelines.register.__main__ import main as register_main
from pipelines.tracking.runs import connect
from pipelines.train.run import Outcome, check_inputs, start_over, train
from pipelines.upscale.__main__ import main as upscale_main
from tests.support.runs import (
    Trained,
    changed,
    files_of,
    kill_a_worker,
    run_config,
    run_named,
    run_to_end,
    write_checkpoint,
)

CT_STEPS, DTM_STEPS = 14, 14
ALL_STEPS = CT_STEPS + DTM_STEPS


@pytest.fixture(scope="module")
def base(ray_session: None, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Both phases, each step logged, a checkpoint every third, a fifth of the published run's learning rate.

    Larger ones turn the last bits in which two groupings round into 1e-4 soon, as AdamW makes whole steps of
    them.
    """
    settings = [f"optim.ct_steps={CT_STEPS}", f"optim.dtm_steps={DTM_STEPS}", "optim.dtm_refresh_steps=5"]
    settings += ["train.log_every_steps=1", "train.checkpoint_every_steps=3", "train.max_failures=3"]
    settings += ["train.global_batch_size=8", "optim.lr=1e-5"]
    return run_config(bucket, tmp_path_factory.mktemp("resuming"), "name=whole", *settings)


@contextmanager
def killing(steps: list[int]) -> Iterator[Queue]:
    """A progress queue that kills a worker when the run reaches each of `steps`."""
    queue, done = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def watch() -> None:
        for step in steps:
            while not done.is_set():
                try:
                    told = queue.get(timeout=0.5)
                except Empty:
                    continue
                if isinstance(told, Progress) and told.step >= step:
                    kill_a_worker()
                    break

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield queue
    finally:
        done.set()
        watcher.join()
        queue.shutdown(force=True)


def losses_of(config: RunConfig) -> dict[int, set[float]]:
    """What MLflow was told by step; a step done twice must have been told the same."""
    run, client = run_named(config.name, config), connect(config.tracking_uri)
    found: dict[int, set[float]] = {}
    for point in client.get_metric_history(run.info.run_id, "loss"):
        found.setdefault(point.step, set()).add(point.value)
    return found


def run_once(config: RunConfig, kills: list[int]) -> Outcome:
    inputs = check_inputs(config)
    with killing(kills) as progress:
        return train(config, inputs, progress)


@pytest.fixture(scope="module")
def whole(base: RunConfig) -> Outcome:
    """The run that nothing stops."""
    return run_once(base, [])


@pytest.mark.slow
def test_killed_at_five_steps_of_each_phase_a_run_ends_bit_equal(base: RunConfig, whole: Outcome) -> None:
    draw = random.Random(time.time_ns())
    kills = sorted(draw.sample(range(1, CT_STEPS), 5)) + sorted(
        draw.sample(range(CT_STEPS, ALL_STEPS - 1), 5)
    )
    config = replace(base, name="killed", train=replace(base.train, max_failures=10))
    outcome = run_once(config, kills)
    assert files_of(outcome.checkpoint_uri) == files_of(whole.checkpoint_uri), kills
    assert losses_of(config) == losses_of(base), kills
    assert all(len(values) == 1 for values in losses_of(config).values())


@pytest.mark.slow
def test_on_other_numbers_of_workers_a_run_goes_on_with_the_same_images(
    base: RunConfig, whole: Outcome
) -> None:
    config = replace(base, name="moved", train=replace(base.train, max_failures=0))
    with pytest.raises(UserError, match="training failed"):
        run_once(config, [10])
    assert 0 < find(config.run_uri).step < ALL_STEPS
    # batches of 8 on three workers: 3, 3 and 2 images, in parts of at most two
    moved = replace(config, train=replace(config.train, num_workers=3, micro_batch_size=2))
    with pytest.raises(UserError, match="training failed"):
        run_once(moved, [18])
    outcome = run_once(replace(config, train=replace(config.train, num_workers=1)), [])
    expected, found = losses_of(base), losses_of(config)
    assert found.keys() == expected.keys() == set(range(1, ALL_STEPS + 1))
    for step, values in expected.items():
        (value,) = values
        for other in found[step]:
            assert other == pytest.approx(value, rel=1e-4), step
    assert outcome.metrics == pytest.approx(whole.metrics, rel=1e-3)
    assert run_named("moved", config).info.status == "FINISHED"


def test_a_run_starts_over_when_told_to(bucket: str, tmp_path: Path) -> None:
    config = run_config(bucket, tmp_path, f"storage_uri={tmp_path}/runs")
    write_checkpoint(config, f"{config.run_uri}/checkpoint_3")
    other = replace(config, seed=5)
    with pytest.raises(ConfigError, match=r"\(seed: 0 -> 5\).* --fresh "):
        check_inputs(other)
    inputs = check_inputs(other, fresh=True)
    assert find(config.run_uri).step == 3  # a check deletes nothing
    start_over(other)
    assert [str(path) for path in list_sizes(config.run_uri)] == ["config.json"]
    assert inputs.train.version == check_inputs(other).train.version


@pytest.mark.parametrize(
    ("is_converted", "scale"), [pytest.param(False, 4, marks=pytest.mark.slow), (True, 3)]
)
def test_dtm_starts_from_a_checkpoint_of_ct_and_from_a_converted_one(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_converted: bool, scale: int
) -> None:
    init_uri = trained.outcome.checkpoint_uri
    with fetched(init_uri) as folder:
        expected, _ = checkpoint.load_model(folder)
        if is_converted:
            init_uri = str(tmp_path / "converted")
            export_pth(folder, tmp_path / "published.pth")
            import_pth(tmp_path / "published.pth", tmp_path / "converted", trained.config)
    settings = [f"init_uri={init_uri}", "optim.ct_steps=0", "optim.dtm_steps=1", "train.num_workers=1"]
    # It stays where it starts: at the trajectory of a run of DTM alone, of two steps.
    settings += ["optim.lr=1e-9", "schedule.s0=2", "loss.dtm_t_max=0.7", 'optim.freeze=["model.enc.*"]']
    if scale != 4:
        settings += [f"network.scale={scale}", "network.lq_size=16", "data.eval_crop_size=48"]
        settings += [f"storage_uri={tmp_path}", f"model_name=x{scale}"]
    config = changed(trained.config, f"name=dtm-{is_converted}", *settings)
    outcome = run_to_end(config)
    assert run_named(config.name, config).data.metrics["dtm_loss"] > 0
    with fetched(outcome.checkpoint_uri) as folder:
        ema, _ = checkpoint.load_model(folder)
    for name, value in ema.state_dict().items():
        if name not in expected.state_dict() or value.shape != expected.state_dict()[name].shape:
            assert scale != 4, name
            continue  # of the layers that depend on the scale
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-2, atol=1e-3)
        if name.startswith("model.enc."):
            assert torch.equal(value, expected.state_dict()[name]), name
    with pytest.raises(ConfigError, match=r"\(optim.freeze: \['model.enc.\*'\] -> \[\]\)"):
        check_inputs(changed(config, "optim.freeze=[]"))
    if scale != 4:
        evaluate_register_and_upscale(config, tmp_path, capsys)


def evaluate_register_and_upscale(
    config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows a run, at its scale."""
    options = ["--config", f"{config.run_uri}/config.json"]
    assert evaluate_main(options) == 0
    assert register_main(options) == 0
    picture = folder / "photo.png"
    picture.write_bytes(encode_png(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)))
    registry = ["--model", f"models:/{config.model_name}/1", "--tracking-uri", config.tracking_uri]
    assert upscale_main([str(picture), "--output", str(folder), *registry]) == 0
    capsys.readouterr()
    scale = config.network.scale
    sr_u8 = decode((folder / f"photo_x{scale}.png").read_bytes(), name="photo")
    assert sr_u8.shape == (20 * scale, 31 * scale, 3)


def test_what_a_run_starts_from_is_told_before_it_starts(trained: Trained) -> None:
    start = [f"init_uri={trained.outcome.checkpoint_uri}", "name=x"]
    assert (
        " tensors, 100.0% of the weights, are loaded" in check_inputs(changed(trained.config, *start)).start
    )
    told = check_inputs(changed(trained.config, *start, "network.scale=2", "network.lq_size=16")).start
    assert told.splitlines()[1:] == [
        "  resampled for another scale: enc.16x16_conv (1 tensor)",
        "  left in the checkpoint: conv_up2 (2 tensors)",
    ]
    assert check_inputs(changed(trained.config, "name=x")).start == ""


@pytest.mark.slow
def test_the_starter_starts_a_run_at_another_scale(
    ray_session: None, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starter = to_dict(PRESETS["small"]().network)
    network = [f"network.{key}={json.dumps(starter[key])}" for key in ("channel_mult", "num_heads")]
    settings = ["init_uri=starter", "network.scale=2", "network.lq_size=32", *network]
    settings += [f"storage_uri={tmp_path}", "model_name=x2"]
    settings += ["optim.lr=1e-4", "optim.ct_steps=2", "optim.dtm_steps=0", "train.num_workers=1"]
    config = run_config(bucket, tmp_path, "name=x2", *settings)
    outcome = run_to_end(config)
    with fetched(outcome.checkpoint_uri) as folder, fetched("starter") as starter_folder:
        model, _ = checkpoint.load_model(folder)
        before, _ = checkpoint.load_model(starter_folder)
    assert model.config.scale == 2
    torch.testing.assert_close(model.model.conv_last.weight, before.model.conv_last.weight, rtol=0, atol=1e-3)
    evaluate_register_and_upscale(config, tmp_path, capsys)


def test_a_checkpoint_that_cannot_be_started_from(trained: Trained) -> None:
    other = changed(
        trained.config, "name=x", f"init_uri={trained.outcome.checkpoint_uri}", "network.model_channels=64"
    )
    with pytest.raises(ConfigError, match=r"init_uri .* is of another network \(model_channels: 32 -> 64\)"):
        check_inputs(other)
    with pytest.raises(CheckpointError, match="init_uri s3://training/none is not a checkpoint"):
        check_inputs(changed(trained.config, "name=x", "init_uri=s3://training/none"))
