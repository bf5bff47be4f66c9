"""Runs a trial: a training run like any other, whose scores go to Ray Tune once its checkpoints are stored.

Only checkpoints complete in storage count, so a search decides on exactly what it finds after an
interruption.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ray import tune
from ray.util.queue import Queue

from ctmsr.config import flatten
from ctmsr.errors import DataError, StoreError
from ctmsr.model.checkpoint import MANIFEST_FILE

from ..config.run_config import RunConfig
from ..infra.checkpoints import LPIPS_BY_PICTURE, Stored, complete, fetched
from ..infra.storage import delete_folder, list_sizes, upload_folder
from ..train.run import Inputs, train_to_the_end, training_run
from .methods import Score, Trial
from .space import trial_config

_POLL_S = 1.0


def kept_scores(config: RunConfig, trial: Trial) -> dict[int, Score]:
    """Scores, by step, that earlier runs of a trial have stored.

    Deletes a folder with another point, left by a search in which other trials failed.

    Raises:
        StoreError: The store denies access or does not respond.
    """
    uri = trial_config(config, trial.point, trial.name).run_uri
    stored = [one for one in complete(uri) if one.step > trial.start_step]
    for one in stored:
        values = flatten(one.config)
        if any(values[key] != value for key, value in trial.point.items()):
            delete_folder(uri)
            return {}
    return _scores(stored)


def run_trial(
    proposal: Mapping[str, Any], config: RunConfig, inputs: Inputs, progress: Queue, parent_run_id: str
) -> None:
    """Ray Tune's trainable.

    Args:
        proposal: The fields of a Trial.
        config: The search's config.
        inputs: The search's inputs.
        progress: From `progress_line`.
        parent_run_id: The search's run in MLflow.
    """
    trial = Trial(**proposal)
    run = trial_config(config, trial.point, trial.name)
    if trial.parent and not any(complete(run.run_uri)):
        _copy_checkpoint(f"{run.storage_uri}/{trial.parent}", trial.start_step, run.run_uri)
    point = ", ".join(f"{key.rpartition('.')[2]} {value:.4g}" for key, value in trial.point.items())
    progress.put_nowait(f"{trial.name}: starting with {point}")
    with training_run(run, inputs, parent_run_id, shown=trial.point) as run_id, _scores_reported(run.run_uri):
        train_to_the_end(run, inputs, progress, run_id, is_trial=True)


@contextmanager
def _scores_reported(run_uri: str) -> Iterator[None]:
    """Reports every checkpoint's scores to Ray Tune once it is stored, for the duration of a `with` block."""
    done, reported = threading.Event(), set[int]()

    def report() -> None:
        for step, score in sorted(_scores(list(complete(run_uri))).items()):
            if step not in reported:
                reported.add(step)
                tune.report({"step": step, **asdict(score)})

    def watch() -> None:
        seen: object = None
        while not done.wait(_POLL_S):
            try:
                if (found := list_sizes(run_uri)) != seen:
                    report()
                    seen = found
            except StoreError:
                continue  # the report at the end tries again, and fails if the store still does

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    report()


def _scores(stored: list[Stored]) -> dict[int, Score]:
    return {
        one.step: Score(metrics["lpips"], metrics["psnr_y"], tuple(one.meta.get(LPIPS_BY_PICTURE, ())))
        for one in stored
        if (metrics := one.meta.get("metrics"))  # it may not have been scored yet
    }


def _copy_checkpoint(parent_uri: str, step: int, run_uri: str) -> None:
    """Copies the parent's checkpoint of one step into a run's folder, for the run to resume from."""
    found = next((one for one in complete(parent_uri) if one.step == step), None)
    if found is None:
        raise DataError(f"there is no checkpoint of step {step} under {parent_uri}. Search with --fresh.")
    with fetched(found.uri) as folder:
        upload_folder(folder, f"{run_uri}/{found.uri.rpartition('/')[2]}", last=MANIFEST_FILE)
