"""Searches that take no time: the score of a trial is a function of its point and step."""

import json
import random
import zlib
from collections.abc import Callable

import numpy as np

from ctmsr.config import from_dict, override, to_dict
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig
from pipelines.tune.methods import Plan, Score, Trial
from pipelines.tune.space import report_steps

Scorer = Callable[[Trial, int], Score | None]


def config_of(*settings: str, preset: str = "published") -> RunConfig:
    return from_dict(RunConfig, override(to_dict(PRESETS[preset]()), list(settings)))


def by_chance(trial: Trial, step: int) -> Score:
    """Any score, but always the same for the same point and step."""
    draw = zlib.crc32(json.dumps([dict(trial.point), step]).encode()) / 2**32
    return Score(lpips=draw, psnr_y=25 + draw * 7 % 1)


def near(sigma_max: float) -> Scorer:
    """The nearer to this sigma_max, the better."""
    return lambda trial, step: Score(abs(trial.point["schedule.sigma_max"] - sigma_max), 25.0)


def on_pictures(sigma_max: float, *, number: int = 40, spread: float = 0.01) -> Scorer:
    """As `near`; pictures differ by much in all trials alike, and by `spread` in each trial its own way."""
    hardness = np.random.default_rng(0).normal(0, 0.3, number)

    def score(trial: Trial, step: int) -> Score:
        own = np.random.default_rng([trial.number, step]).normal(0, spread, number)
        pictures = (
            hardness + own - (hardness + own).mean() + abs(trial.point["schedule.sigma_max"] - sigma_max)
        )
        return Score(float(pictures.mean()), 25.0, tuple(pictures.tolist()))

    return score


def run(config: RunConfig, score: Scorer, order: random.Random, kill_share: float = 0.0) -> Plan:
    """A search whose trials advance in any order, and which is killed and continued now and then.

    `score` gives None for a trial that fails.
    """
    stored: dict[str, dict[int, Score]] = {}
    plan, running, num_looked_at = Plan(config), list[Trial](), 0
    while True:
        plan.extend()
        while len(running) < config.tune.max_concurrent and num_looked_at < len(plan.trials):
            trial = plan.trials[num_looked_at]
            num_looked_at += 1
            plan.scores[trial.name] = dict(stored.get(trial.name, {}))
            if not plan.is_over(trial):
                running.append(trial)
            plan.extend()
        if not running:
            return plan
        trial = order.choice(running)
        done = max(stored.get(trial.name, {}), default=trial.start_step)
        step = next(step for step in report_steps(config.tune) if step > done)
        if (scored := score(trial, step)) is None:
            plan.failed.add(trial.name)
        else:
            stored.setdefault(trial.name, {})[step] = plan.scores[trial.name][step] = scored
        if step == report_steps(config.tune)[-1] or plan.is_over(trial):
            running.remove(trial)
        if order.random() < kill_share:
            plan, running, num_looked_at = Plan(config), [], 0
