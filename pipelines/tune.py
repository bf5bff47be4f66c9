"""Search the noise schedule: Ray Tune, each trial a training run. `python -m pipelines.tune --help`."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.util.queue import Queue

from ctmsr.config import from_dict, override, to_dict
from ctmsr.errors import ConfigError, UserError

from .cli import config_parser, print_config, resolve
from .cluster import ray_cluster
from .command import run
from .config import RunConfig, TuneConfig
from .progress import progress_line
from .storage import open_uri, write_bytes
from .tracking import ensure_experiment, finish_children, tracked_run
from .train import Inputs, build_trainer, check_inputs, fit, training_run

EXAMPLES = """\
  four short trials on this machine:
    python -m pipelines.tune --set name=first --set data.train_uri=photos/train --set data.val_uri=photos/val
  then train with the best schedule:
    python -m pipelines.train --config runs/first-tune/best.json"""

RANGES = ("sigma_max", "noise_rho", "res_rho")
CHOICES = ("s0", "s1")
NUM_REPORTS = 4
"""Evaluations of a trial, at which ASHA may stop it."""
_TRIAL = "trial-"


@dataclass(frozen=True)
class Trial:
    """One schedule, and how the EMA weights scored on data.val_uri at the trial's last report."""

    schedule: dict[str, Any]
    step: int
    lpips: float
    psnr_y: float


@dataclass(frozen=True)
class Search:
    """A finished search; trials from best to worst."""

    trials: list[Trial]
    config: RunConfig
    """The run's config with the best schedule."""
    config_uri: str
    """Where it is written, for `pipelines.train --config`."""


def trial_config(config: RunConfig, schedule: Mapping[str, Any], name: str) -> RunConfig:
    """The training run that a trial is, through the loader that every config passes.

    Raises:
        ConfigError: The command line would refuse it, too.
    """
    space = config.tune
    every = max(1, (space.ct_steps + space.dtm_steps) // NUM_REPORTS)
    changes = {f"schedule.{key}": value for key, value in schedule.items()} | {
        "name": name,
        "storage_uri": f"{config.run_uri}-tune",
        "optim.ct_steps": space.ct_steps,
        "optim.dtm_steps": space.dtm_steps,
        "train.checkpoint_every_steps": every,
        "train.num_checkpoints_kept": 1,
        "train.num_best_kept": 0,
    }
    return from_dict(
        RunConfig, override(to_dict(config), [f"{k}={json.dumps(v)}" for k, v in changes.items()])
    )


def check_space(config: RunConfig) -> None:
    """Builds the config of every corner of the search space, so that no trial fails on it later.

    Raises:
        ConfigError: A corner is not allowed.
    """
    space = config.tune
    values = [getattr(space, key) for key in (*RANGES, *CHOICES)]
    for corner in itertools.product(*values):
        schedule = dict(zip((*RANGES, *CHOICES), corner, strict=True))
        try:
            trial_config(config, schedule, "trial")
        except ConfigError as error:
            raise ConfigError(
                f"the search space holds a schedule that is not allowed, {schedule}: {error}"
            ) from error


def search(config: RunConfig, inputs: Inputs, progress: Queue) -> Search:
    """Runs the trials and writes the best config beside them.

    Raises:
        UserError: No trial reached its end.
    """
    file_system, storage_path = open_uri(config.storage_uri)
    folder = f"{config.name}-tune"
    experiment_id = ensure_experiment(inputs.tracking_uri, config.experiment)
    with tracked_run(
        inputs.tracking_uri, experiment_id, folder, params=to_dict(config), tags={"search": "true"}
    ) as parent_run_id:
        run_trial = tune.with_parameters(
            _run_trial, config=config, inputs=inputs, progress=progress, parent_run_id=parent_run_id
        )
        results = tune.Tuner(
            # A trial only waits for its workers. With the default of one CPU, waiting trials starve them.
            tune.with_resources(run_trial, {"memory": 2**20}),
            param_space=_sampling(config.tune),
            tune_config=tune.TuneConfig(
                num_samples=config.tune.num_trials,
                search_alg=BasicVariantGenerator(
                    points_to_evaluate=[_schedule_of(config)],
                    random_state=config.seed,
                    max_concurrent=config.tune.max_concurrent,
                ),
                scheduler=_scheduler(config.tune),
            ),
            run_config=tune.RunConfig(
                name=folder, storage_path=storage_path, storage_filesystem=file_system, verbose=0
            ),
        ).fit()
        ended = [results[index] for index in range(len(results))]
        failed = " ".join(result.path for result in ended if result.error)  # a path holds the trial's id
        finish_children(
            inputs.tracking_uri,
            experiment_id,
            parent_run_id,
            lambda name: name.removeprefix(_TRIAL) in failed,
        )
    trials = sorted(
        (
            _trial(result.config, result.metrics)
            for result in ended
            if result.config and result.metrics and "lpips" in result.metrics
        ),
        key=lambda trial: (-trial.step, trial.lpips, -trial.psnr_y),
    )
    if not trials:
        raise UserError(
            f"no trial of {folder} reached its first report. First error: {_first_error(results)}"
        )
    best = from_dict(
        RunConfig, override(to_dict(config), [f"schedule.{k}={v}" for k, v in trials[0].schedule.items()])
    )
    config_uri = f"{config.run_uri}-tune/best.json"
    write_bytes(config_uri, (json.dumps(to_dict(best), indent=2) + "\n").encode())
    return Search(trials, best, config_uri)


def table(trials: list[Trial]) -> str:
    """The trials as lines of text, best first."""
    header = f"{'':2}{'sigma_max':>10}{'noise_rho':>10}{'res_rho':>9}{'s0':>4}{'s1':>4}{'steps':>8}"
    lines = [f"{header}{'LPIPS':>9}{'PSNR-Y dB':>11}   on data.val_uri"]
    for trial in trials:
        s = trial.schedule
        lines.append(
            f"{'*' if trial is trials[0] else '':2}{s['sigma_max']:>10.3f}{s['noise_rho']:>10.3f}"
            f"{s['res_rho']:>9.3f}{s['s0']:>4}{s['s1']:>4}{trial.step:>8}{trial.lpips:>9.4f}{trial.psnr_y:>11.2f}"
        )
    return "\n".join(lines)


def _run_trial(
    schedule: Mapping[str, Any], config: RunConfig, inputs: Inputs, progress: Queue, parent_run_id: str
) -> None:
    trial = trial_config(config, schedule, f"{_TRIAL}{tune.get_context().get_trial_id()}")
    with training_run(trial, inputs, parent_run_id) as run_id:
        report = TuneReportCallback()
        fit(trial, lambda: build_trainer(trial, inputs, progress, run_id, callbacks=[report]), progress)


def _sampling(space: TuneConfig) -> dict[str, Any]:
    ranges = {key: tune.uniform(*getattr(space, key)) for key in RANGES}
    return ranges | {key: tune.choice(list(getattr(space, key))) for key in CHOICES}


def _schedule_of(config: RunConfig) -> dict[str, Any]:
    return {key: getattr(config.schedule, key) for key in (*RANGES, *CHOICES)}


def _scheduler(space: TuneConfig) -> ASHAScheduler:
    total = space.ct_steps + space.dtm_steps
    return ASHAScheduler(
        time_attr="step",
        metric="lpips",
        mode="min",
        max_t=total,
        grace_period=max(1, total // NUM_REPORTS),
        reduction_factor=2,
    )


def _trial(schedule: Mapping[str, Any], metrics: Mapping[str, Any]) -> Trial:
    return Trial(dict(schedule), metrics["step"], metrics["lpips"], metrics["psnr_y"])


def _first_error(results: tune.ResultGrid) -> str:
    return next((str(error).strip().splitlines()[-1] for error in results.errors), "none was raised")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("tune", __doc__ or "", EXAMPLES)
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    check_space(config)
    if arguments.dry_run:
        return print_config(config)
    inputs = check_inputs(config)
    with ray_cluster(), progress_line() as progress:
        found = search(config, inputs, progress)
    print(table(found.trials))
    print(f"best config: {found.config_uri}")
    print(f"next: python -m pipelines.train --config {found.config_uri}")
    return 0


if __name__ == "__main__":
    run(main)
