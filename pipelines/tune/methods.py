"""How a search chooses: ASHA, TPE and PBT as functions of the scores, whatever order they come in.

Trials run concurrently and finish in an unpredictable order. To make a search reproducible from its seed all
the same, decisions do not depend on timing: they depend on the scores of trials with lower numbers (ASHA,
TPE) or of a whole generation (PBT), and are made once these are known. Until then a trial keeps running; if
it turns out to stop at an earlier step, the steps after that do not count. Scores are themselves functions of
a trial's config, so an interrupted search reads them from the checkpoints and makes the same decisions again.

The objective of a trial at a step is the LPIPS of its EMA weights after one network call on data.val_uri.
LPIPS alone favours noise that passes for texture, above all in short trials. So each dB of PSNR-Y that a
trial loses to the first one at the same step, beyond tune.max_psnr_loss_db, costs it 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna

from ..config.run_config import RunConfig
from .space import Point, Range, is_inside, own_point, perturbed, random_point, report_steps, search_space

FREE: Mapping[str, Sequence[str]] = {
    "asha": ("tune.num_trials", "tune.max_concurrent"),
    "tpe": ("tune.num_trials",),
    "pbt": ("tune.max_concurrent",),
}
"""Keys that may change when a search is resumed, by method: ASHA and TPE can be extended by more trials."""
_FIRST = "trial-000"
_STARTUP_TRIALS = 5
"""Trials that TPE draws at random before it uses scores."""
_PBT_SHARE = 4
"""At each report PBT replaces one member in this many, the worst, by copies of the best."""


@dataclass(frozen=True)
class Trial:
    """One training run or, for PBT, the part of one between two reports."""

    name: str
    number: int
    point: Point
    stop_step: int
    """Step to train to; the learning rate and the curriculum still follow the whole budget."""
    start_step: int = 0
    parent: str = ""
    """The trial from whose checkpoint of `start_step` this one continues."""


@dataclass(frozen=True)
class Score:
    """Scores of a trial's EMA weights on data.val_uri."""

    lpips: float
    psnr_y: float
    lpips_by_picture: tuple[float, ...] = ()
    """For each picture, the mean over its draws; empty for checkpoints of earlier versions."""


@dataclass(frozen=True)
class Ranked:
    """A trial's final step and score."""

    trial: Trial
    step: int
    score: Score
    objective: float


class Plan:
    """The trials of a search, their scores, and what follows from them."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._steps = report_steps(config.tune)
        self.trials: list[Trial] = []
        """As many as the scores determine so far."""
        self.scores: dict[str, dict[int, Score]] = {}
        """By the name of the trial and by step."""
        self.failed: set[str] = set()

    def extend(self) -> None:
        """Adds the trials that the scores determine by now."""
        method = self._config.tune.method
        if method == "pbt":
            self.trials += self._next_generation()
            return
        while (number := len(self.trials)) < self._config.tune.num_trials:
            if number == 0:
                point = own_point(self._config)
            elif method == "asha":
                point = random_point(self._config, number)
            else:
                # The others may still be running when this one starts: how many is part of the method.
                known = self.trials[: max(0, number + 1 - self._config.tune.max_concurrent)]
                if not all(self.is_over(trial) for trial in known):
                    return
                point = self._tpe_point(number, known)
            self.trials.append(Trial(f"trial-{number:03d}", number, point, self._steps[-1]))

    def is_over(self, trial: Trial) -> bool:
        """Whether further steps of the trial would not count."""
        is_scored = trial.stop_step in self.scores.get(trial.name, {})
        return is_scored or trial.name in self.failed or trial.number in self._stops()

    def ranking(self) -> list[Ranked]:
        """Finished trials, best first: by step, then objective, then PSNR-Y."""
        stops, last = self._stops(), self._steps[-1]
        ends = [(trial, stops.get(trial.number, last)) for trial in self.trials if trial.stop_step == last]
        return self._ranked(ends)

    def objective(self, score: Score, step: int) -> float:
        """The quantity that a search minimises; see the top of this module."""
        own = (scores.get(step) for name, scores in self.scores.items() if name.startswith(_FIRST))
        first = next(filter(None, own), None)
        floor = first.psnr_y - self._config.tune.max_psnr_loss_db if first else -math.inf
        return score.lpips + max(0.0, floor - score.psnr_y)

    def _ranked(self, ends: Sequence[tuple[Trial, int]]) -> list[Ranked]:
        ranked = [
            Ranked(trial, step, score, self.objective(score, step))
            for trial, step in ends
            if (score := self.scores.get(trial.name, {}).get(step))
        ]
        return sorted(ranked, key=lambda one: (-one.step, one.objective, -one.score.psnr_y))

    def _stops(self) -> dict[int, int]:
        """Steps at which trials were stopped, by their number."""
        if self._config.tune.method != "asha":
            return {}
        values = [
            {step: self.objective(score, step) for step, score in self.scores.get(trial.name, {}).items()}
            for trial in self.trials
        ]
        return asha_stops(values, [trial.name in self.failed for trial in self.trials], self._steps[:-1][:2])

    def _tpe_point(self, number: int, known: Sequence[Trial]) -> Point:
        """From Optuna's tree-structured Parzen estimator: a function of the seed, number and scores."""
        space = search_space(self._config.tune)
        seed = int(np.random.default_rng([self._config.seed, number]).integers(2**31))
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
        study = study_of(
            space,
            [
                (one.trial.point, one.objective)
                for one in self._ranked([(trial, self._steps[-1]) for trial in known])
            ],
            sampler,
        )
        return study.ask({**space}).params

    def _next_generation(self) -> list[Trial]:
        """Population-based training (Jaderberg et al. 2017, arXiv:1711.09846), a whole generation at a time.

        The worst members, and those that failed, continue from a checkpoint of one of the best, with its
        point perturbed. The first member is never replaced: it remains the baseline for the others.
        """
        if not self.trials:
            points = [random_point(self._config, number) for number in range(self._config.tune.num_trials)]
            points[0] = own_point(self._config)
            return [self._member(number, 0, point) for number, point in enumerate(points)]
        step = self.trials[-1].stop_step
        current = [trial for trial in self.trials if trial.stop_step == step]
        ranked = [one.trial for one in self._ranked([(trial, step) for trial in current])]
        if not all(map(self.is_over, current)) or step == self._steps[-1] or not ranked:
            return []
        generation, num = self._steps.index(step) + 1, max(1, len(current) // _PBT_SHARE)
        best, kept = ranked[:num], ranked[: max(num, len(ranked) - num)]
        rng = np.random.default_rng([self._config.seed, len(self.trials)])
        following = []
        for trial in current:
            if trial in kept or (trial.number == 0 and trial in ranked):
                following.append(self._member(trial.number, generation, trial.point, trial))
            elif trial.number != 0:
                donor = best[int(rng.integers(len(best)))]
                point = perturbed(self._config, donor.point, rng)
                following.append(self._member(trial.number, generation, point, donor))
        return following

    def _member(self, number: int, generation: int, point: Point, parent: Trial | None = None) -> Trial:
        name = f"trial-{number:03d}-{generation + 1}"
        if parent is None:
            return Trial(name, number, point, self._steps[generation])
        if parent.number != number:
            name += f"-from-{parent.number:03d}"
        return Trial(name, number, point, self._steps[generation], parent.stop_step, parent.name)


def asha_stops(
    values: Sequence[Mapping[int, float]], failed: Sequence[bool], rungs: Sequence[int]
) -> dict[int, int]:
    """Which trials stop and at which step, as far as the values determine it by now.

    Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934) with a factor of 2, for trials taken in
    the order of their numbers: at each rung a trial goes on if it is in the better half, rounded up, of the
    trials up to its own number that reached the rung. So the first trial always goes on.

    Args:
        values: The objective of every trial, by step.
        failed: Whether each trial ended in an error; it still counts at the steps it has values for.
        rungs: Steps at which to decide, ascending.

    Returns:
        The step to stop at, by trial number.
    """
    stops: dict[int, int] = {}
    going = list(range(len(values)))
    for rung in rungs:
        seen: list[float] = []
        passed: list[int] = []
        for number in going:
            value = values[number].get(rung)
            if value is None:
                if any(step > rung for step in values[number]):  # a preemption lost this score
                    passed.append(number)
                elif not failed[number]:
                    break  # trials after it are undecided
                continue
            seen.append(value)
            if sum(other < value for other in seen) < math.ceil(len(seen) / 2):
                passed.append(number)
            else:
                stops[number] = rung
        going = passed
    return stops


def study_of(
    space: Mapping[str, Range],
    points: Sequence[tuple[Point, float]],
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """An Optuna study of the points inside the space and their values, lower being better."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(
        [
            optuna.trial.create_trial(params=dict(point), distributions={**space}, value=value)
            for point, value in points
            if is_inside(point, space)
        ]
    )
    return study
