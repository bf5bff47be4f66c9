"""Searches noise schedules: Ray Tune runs the trials of a plan, each of them a training run."""

import dataclasses
import importlib.metadata
import json
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.queue import Queue

from ctmsr.config import check, to_dict
from ctmsr.errors import DataError, StoreError, UserError

from ..config.identity import search_identity
from ..config.run_config import RunConfig
from ..infra.progress import Ended
from ..infra.ray_internals import keep_secrets_out_of_trials
from ..infra.storage import delete_folder, open_uri, read_bytes, write_bytes
from ..tracking.metric_logger import MetricLogger
from ..tracking.runs import ensure_experiment, find_run, finish_children, log_files, tracked_run
from ..train.leader import LIBRARIES
from ..train.run import Inputs, check_inputs
from .methods import FREE, Plan, Ranked, Score, Trial
from .report import plots, table
from .space import check_space, folder_uri, report_steps, with_point
from .trial import kept_scores, run_trial
from .verdict import chosen, verdict


@dataclass(frozen=True)
class Search:
    """A finished search."""

    trials: list[Ranked]
    """From best to worst, without failed ones."""
    config: RunConfig
    """The run's config with the best point, or with its own if none proved better."""
    config_uri: str
    """Where `config` is stored, for `pipelines.train --config`."""
    report: str
    """The table of trials and the verdict."""


def check_search(config: RunConfig, *, fresh: bool = False) -> Inputs:
    """Checks everything that a search needs, within seconds and without Ray.

    Raises:
        UserError: The space, pictures, storage, backbones or MLflow cannot be used, or the folder contains
            another search and `fresh` is not set.
    """
    check_space(config)
    inputs = check_inputs(dataclasses.replace(config, name=f"{config.name}-tune"))
    if not fresh:
        _refuse_changed_search(config, inputs)
    return inputs


def search(config: RunConfig, inputs: Inputs, progress: Queue, *, fresh: bool = False) -> Search:
    """Runs the remaining trials, and stores the best config and the report in their folder.

    Args:
        config: The run to find a schedule for.
        inputs: From `check_search`.
        progress: From `progress_line`.
        fresh: Whether to delete an earlier search of this name and start over.

    Raises:
        UserError: No trial reached its first report.
    """
    folder = folder_uri(config)
    if fresh:
        delete_folder(folder)
    write_bytes(f"{folder}/search.json", json.dumps(_identity(config, inputs), indent=2).encode())
    experiment_id = ensure_experiment(inputs.tracking_uri, config.experiment)
    tags = {
        "search": "true",
        "storage": folder if "://" in folder else open_uri(folder)[1],
        "train_version": inputs.train.version,
        "val_version": inputs.val.version,
        **{f"version.{name}": importlib.metadata.version(name) for name in (*LIBRARIES, "optuna")},
    }
    known = None if fresh else find_run(inputs.tracking_uri, experiment_id, {"storage": tags["storage"]})
    with tracked_run(
        inputs.tracking_uri,
        experiment_id,
        f"{config.name}-tune",
        params=to_dict(config),
        tags=tags,
        run_id=known,
    ) as run_id:
        plan = Plan(config)
        errors = _run_trials(plan, config, inputs, progress, run_id)
        objectives = {one.trial.name: (one.objective, one.step) for one in plan.ranking()}
        finish_children(inputs.tracking_uri, experiment_id, run_id, errors.__contains__, objectives)
        found = _found(config, plan, errors)
        _store_report(found, inputs.tracking_uri, run_id)
    return found


class _Proposals(Searcher):
    """Gives Ray Tune the trials of a plan in order, except those that an earlier search finished."""

    def __init__(self, plan: Plan, config: RunConfig, progress: Queue) -> None:
        super().__init__()
        self._plan, self._config, self._progress = plan, config, progress
        self._num_taken = 0
        self._trials: dict[str, Trial] = {}

    def upcoming(self) -> Trial | None:
        """The next trial to run, if the scores determine it; the same one until `suggest` takes it."""
        while True:
            self._plan.extend()
            if self._num_taken == len(self._plan.trials):
                return None
            trial = self._plan.trials[self._num_taken]
            if trial.name not in self._plan.scores:
                self._plan.scores[trial.name] = kept_scores(self._config, trial)
            if not self._plan.is_over(trial):
                return trial
            self._num_taken += 1

    def suggest(self, trial_id: str) -> Any:
        """The fields of a Trial; None while more scores are needed to determine the next one."""
        trial = self.upcoming()
        if trial is None:
            return Searcher.FINISHED if all(map(self._plan.is_over, self._plan.trials)) else None
        self._num_taken += 1
        self._trials[trial_id] = trial
        return dataclasses.asdict(trial)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Records a trial that failed."""
        trial = self._trials[trial_id]
        self._progress.put_nowait(Ended(trial.name))
        if error or not self._plan.is_over(trial):
            self._plan.failed.add(trial.name)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Saves nothing: a search resumes from the checkpoints of its trials."""


class _Scores(FIFOScheduler):
    """Adds the scores of running trials to a plan, and stops the trials that are over."""

    def __init__(self, plan: Plan, config: RunConfig) -> None:
        super().__init__()
        self._plan, self._last_step = plan, report_steps(config.tune)[-1]

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Whether to continue or stop the trial."""
        if "step" not in result:  # it ended without a score
            return TrialScheduler.CONTINUE
        known = Trial(**trial.config)
        self._plan.scores[known.name][result["step"]] = Score(
            result["lpips"], result["psnr_y"], tuple(result["lpips_by_picture"])
        )
        if result["step"] < self._last_step and self._plan.is_over(known):
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE  # after its last step it ends by itself


def _run_trials(
    plan: Plan, config: RunConfig, inputs: Inputs, progress: Queue, run_id: str
) -> dict[str, str]:
    """Runs the trials of a plan; returns the errors of those that failed, by name."""
    proposals = _Proposals(plan, config, progress)
    if proposals.upcoming() is None:
        return {}
    if num_over := sum(map(plan.is_over, plan.trials)):
        progress.put_nowait(f"resuming {folder_uri(config)}: {num_over} trials are done.")
    keep_secrets_out_of_trials()
    file_system, path = open_uri(folder_uri(config))
    trainable = tune.with_parameters(
        run_trial, config=config, inputs=inputs, progress=progress, parent_run_id=run_id
    )
    results = tune.Tuner(
        # A trial only waits for its workers. With the default of one CPU, waiting trials starve them.
        tune.with_resources(trainable, {"memory": 2**20}),
        param_space={},  # see _Proposals
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until there are no more trials
            max_concurrent_trials=config.tune.max_concurrent,
            search_alg=proposals,
            scheduler=_Scores(plan, config),
            trial_dirname_creator=lambda trial: trial.config["name"],
            reuse_actors=False,  # stopping a trial must end its process, and with it the training
        ),
        run_config=tune.RunConfig(
            name="ray-tune", storage_path=path, storage_filesystem=file_system, verbose=0
        ),
    ).fit()
    ended = [results[index] for index in range(len(results))]
    failed = {result.config["name"]: result.error for result in ended if result.config and result.error}
    return {name: str(error).strip().splitlines()[-1] for name, error in sorted(failed.items())}


def _found(config: RunConfig, plan: Plan, errors: dict[str, str]) -> Search:
    trials = plan.ranking()
    folder = folder_uri(config)
    failures = [f"{name} failed: {text}" for name, text in errors.items()]
    if not trials:
        raise UserError(f"no trial of {folder} finished. {'; '.join(failures[:1])}")
    report = [table(trials), *failures, verdict(config, trials)]
    best = with_point(config, chosen(trials).trial.point)
    return Search(trials, best, f"{folder}/best.json", "\n".join(report))


def _store_report(found: Search, tracking_uri: str, run_id: str) -> None:
    """Stores the best config, the table and the plots in the search's folder and its MLflow run."""
    files = {
        "best.json": (json.dumps(to_dict(found.config), indent=2) + "\n").encode(),
        "trials.txt": (found.report + "\n").encode(),
        **plots(found.config, found.trials),
    }
    for name, data in files.items():
        write_bytes(f"{folder_uri(found.config)}/{name}", data)
    log_files(tracking_uri, run_id, files)
    logger, best = MetricLogger(tracking_uri, run_id), found.trials[0]
    logger.log(
        {"objective": best.objective, "val_lpips": best.score.lpips, "val_psnr_y": best.score.psnr_y},
        best.step,
    )
    logger.close()


def _identity(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """What identifies a search."""
    return {
        "config": to_dict(config),
        "train_version": inputs.train.version,
        "val_version": inputs.val.version,
    }


def _refuse_changed_search(config: RunConfig, inputs: Inputs) -> None:
    folder = folder_uri(config)
    try:
        file_system, path = open_uri(f"{folder}/search.json")
        stored = json.loads(read_bytes(file_system, path))
    except StoreError:
        raise
    except DataError:
        return  # there is none
    now = _identity(config, inputs)
    changed = search_identity(FREE[config.tune.method]).changes(
        stored.pop("config") | stored, now.pop("config") | now
    )
    check(
        not changed,
        f"{folder} holds another search ({', '.join(changed)}). Restore the old values to resume it, set "
        "another name to start a new one, or use --fresh to delete it and start over.",
    )
