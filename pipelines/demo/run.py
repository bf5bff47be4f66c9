"""Runs the demo's pipelines one after the other, and makes the picture that compares their results."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ctmsr.config import from_dict, override, to_dict
from ctmsr.degradation.recipe import degrade
from ctmsr.image import center_crop, decode, encode_png
from ctmsr.metrics.scoring import bicubic, table
from ctmsr.rng import sample_rng

from ..config.presets import PRESETS
from ..config.run_config import RunConfig
from ..data.held_out import find_held_out
from ..evaluate.run import evaluate, write_report
from ..infra.checkpoints import STARTER, fetched
from ..infra.cluster import ray_cluster
from ..infra.invocation import as_typed
from ..infra.progress import progress_line
from ..register.comparison import find_comparison
from ..register.run import register
from ..tracking.released import find_released
from ..train.run import check_inputs, train
from ..tune.run import search
from .bucket import BUCKET, PHOTOS, photo


def demo_config(output: Path, overrides: list[str]) -> RunConfig:
    """The `small` preset on the demo's bucket, from the starter model, which needs a lower learning rate."""
    places = {
        "name": "fine-tuned",
        "init_uri": STARTER,
        "optim.lr": 2e-5,
        "optim.ct_steps": 90,
        "optim.lr_halve_at": 60,
        "storage_uri": f"s3://{BUCKET}/runs",
        "tracking_uri": f"sqlite:///{output}/mlflow.db",
        **{f"data.{part}_uri": f"s3://{BUCKET}/photos/{part}" for part in PHOTOS},
    }
    assignments = [f"{key}={value}" for key, value in places.items()]
    return from_dict(RunConfig, override(to_dict(PRESETS["small"]()), [*assignments, *overrides]))


def run_pipelines(config: RunConfig, output: Path) -> Path:
    """tune -> train -> evaluate -> register -> upscale; returns the comparison picture."""
    inputs = check_inputs(config)
    held_out = find_held_out(config.data)
    with ray_cluster():
        _announce("tune", f"{config.tune.num_trials} noise schedules, {config.tune.ct_steps} steps each")
        with progress_line() as progress:
            found = search(config, inputs, progress)
        print(found.report)

        configs = {"from scratch": _from_scratch(found.config), "fine-tuned": found.config}
        outcomes, evaluations = {}, {}
        for name, one in configs.items():
            _announce("train", f"{name}, {one.train.num_workers} workers, {one.optim.total_steps} steps")
            with progress_line() as progress:
                outcomes[name] = train(one, check_inputs(one), progress)

        _announce("evaluate", f"{len(PHOTOS['test'])} photographs that were not trained on")
        for name, one in configs.items():
            evaluations[name] = evaluate(one, outcomes[name].checkpoint_uri, held_out)
            write_report(one, outcomes[name].checkpoint_uri, held_out, evaluations[name])
        print(table(evaluations))

        _announce(
            "register", f"the fine-tuned model, compared with bicubic, in MLflow as {config.model_name}"
        )
        outcome = outcomes["fine-tuned"]
        with fetched(outcome.checkpoint_uri) as folder:
            decision = register(
                folder,
                tracking_uri=inputs.tracking_uri,
                model_name=config.model_name,
                run_id=outcome.run_id,
                metrics=evaluations["fine-tuned"].means,
                tags={"data.test_uri": config.data.test_uri},
                rule=config.register,
                comparison=find_comparison(config),
            )
        print(f"version {decision.version}: {decision.reason}")

    _announce("upscale", "a new process pulls the champion from MLflow")
    return _compare(config, outcomes["from scratch"].checkpoint_uri, output)


def _from_scratch(config: RunConfig) -> RunConfig:
    """The same run without the starter, at the learning rate of random weights."""
    optim = replace(config.optim, lr=PRESETS["small"]().optim.lr)
    return replace(config, name="from-scratch", init_uri="", optim=optim)


def _compare(config: RunConfig, from_scratch_uri: str, output: Path) -> Path:
    """Degrades the held-out photographs, upscales them with both models, and shows the results beside HR."""
    lq_folder = output / "lq"
    lq_folder.mkdir()
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in PHOTOS["test"]:
        hr_u8 = center_crop(decode(photo(name), name=name), config.data.eval_crop_size, name=name)
        rng = sample_rng(0, 0, name, "demo")
        lq_u8 = degrade(hr_u8, scale=config.network.scale, config=config.degradation, rng=rng)
        pairs[Path(name).stem] = (hr_u8, lq_u8)
        (lq_folder / f"{Path(name).stem}.png").write_bytes(encode_png(lq_u8))
    command = ["-m", "pipelines.upscale", str(lq_folder), "--output", str(output)]
    subprocess.run([sys.executable, *command, "--tracking-uri", config.tracking_uri], check=True)
    from_scratch = find_released(from_scratch_uri, config.tracking_uri).load()
    scale, rows = config.network.scale, []
    for stem, (hr_u8, lq_u8) in pairs.items():
        fine_tuned = decode((output / f"{stem}_x{scale}.png").read_bytes(), name=stem)
        rows.append(np.hstack([bicubic(lq_u8, scale), from_scratch(lq_u8, 0), fine_tuned, hr_u8]))
    picture = output / "comparison.png"
    picture.write_bytes(encode_png(np.vstack(rows)))
    return picture


def _announce(command: str, what: str) -> None:
    """Prints a heading for the next pipeline."""
    print(as_typed(f"\npython -m pipelines.{command}: {what}"), flush=True)
