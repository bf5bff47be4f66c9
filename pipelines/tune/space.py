"""The search space: which keys of a run's config a search varies, their ranges, and points in the space.

The ranges are fields of TuneConfig, next to the config that they vary. Points become configs through the same
strict loader as every other config (`trial_config`), so no trial gets a value that the command line rejects.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution

from ctmsr.config import flatten, from_dict, override, to_dict
from ctmsr.errors import ConfigError

from ..config.run_config import RunConfig, TuneConfig

Point = Mapping[str, Any]
"""Values by config key, such as {"schedule.sigma_max": 0.8, "schedule.s0": 4}."""
Range = FloatDistribution | CategoricalDistribution

VARIED = {
    "sigma_max": "schedule.sigma_max",
    "noise_rho": "schedule.noise_rho",
    "res_rho": "schedule.res_rho",
    "s0": "schedule.s0",
    "s1": "schedule.s1",
    "dtm_weight": "loss.dtm_weight",
    "dtm_t_min": "loss.dtm_t_min",
    "dtm_t_max": "loss.dtm_t_max",
}
"""The config key that each range or list of choices in TuneConfig is for."""
CHOICES = ("s0", "s1")
NUM_REPORTS = 4
"""Evaluations of a trial, evenly spread over its steps."""


def search_space(tune: TuneConfig) -> dict[str, Range]:
    """The range or choices of each varied key, by config key."""
    space: dict[str, Range] = {}
    for name, key in VARIED.items():
        if values := getattr(tune, name):
            space[key] = CategoricalDistribution(values) if name in CHOICES else FloatDistribution(*values)
    return space


def own_point(config: RunConfig) -> Point:
    """The run's own values of the keys that are varied; they may lie outside the ranges."""
    values = flatten(to_dict(config))
    return {key: values[key] for key in search_space(config.tune)}


def random_point(config: RunConfig, number: int) -> Point:
    """The point of trial `number`, uniform in the space: a function of `number` and the run's seed."""
    rng = np.random.default_rng([config.seed, number])
    return {key: _drawn(one, rng) for key, one in search_space(config.tune).items()}


def perturbed(config: RunConfig, point: Point, rng: np.random.Generator) -> Point:
    """A nearby point: each value moved by a fifth of its range, one choice in four drawn again."""
    found: dict[str, Any] = {}
    for key, one in search_space(config.tune).items():
        if isinstance(one, FloatDistribution):
            moved = point[key] + float(rng.choice([-0.2, 0.2])) * (one.high - one.low)
            found[key] = min(max(moved, one.low), one.high)
        else:
            found[key] = _drawn(one, rng) if rng.random() < 0.25 else point[key]
    return found


def is_inside(point: Point, space: Mapping[str, Range]) -> bool:
    """Whether the point could have been drawn."""
    return all(
        one.low <= point[key] <= one.high if isinstance(one, FloatDistribution) else point[key] in one.choices
        for key, one in space.items()
    )


def with_point(config: RunConfig, point: Point) -> RunConfig:
    """The run with the values of a point.

    Raises:
        ConfigError: The command line would refuse it, too.
    """
    return _changed(config, point)


def trial_config(config: RunConfig, point: Point, name: str) -> RunConfig:
    """The config of a trial's training run.

    It keeps all its checkpoints, with room for those made on preemption: they hold the scores from which a
    search resumes.

    Raises:
        ConfigError: The command line would refuse it, too.
    """
    tune = config.tune
    return _changed(
        config,
        {
            **point,
            "name": name,
            "storage_uri": folder_uri(config),
            "optim.ct_steps": tune.ct_steps,
            "optim.dtm_steps": tune.dtm_steps,
            "train.checkpoint_every_steps": report_steps(tune)[0],
            "train.num_checkpoints_kept": 2 * NUM_REPORTS,
        },
    )


def folder_uri(config: RunConfig) -> str:
    """The search's folder, with its trials, best config and report."""
    return f"{config.run_uri}-tune"


def report_steps(tune: TuneConfig) -> list[int]:
    """Steps at which a trial is scored: after each quarter, the last included."""
    total = tune.ct_steps + tune.dtm_steps
    every = -(-total // NUM_REPORTS)
    return sorted({min(every * quarter, total) for quarter in range(1, NUM_REPORTS + 1)})


def check_space(config: RunConfig) -> None:
    """Builds the config of every corner of the space, so that no trial fails on it later.

    If the corners are valid, so is everything between them: every check of these keys limits a single key, or
    a difference that is monotonic in each key. Every choice is part of some corner.

    Raises:
        ConfigError: Nothing is varied, or a corner is not allowed.
    """
    space = search_space(config.tune)
    if not space:
        raise ConfigError("the search space is empty. Give tune.sigma_max or another key of tune a range.")
    ends = [
        (one.low, one.high) if isinstance(one, FloatDistribution) else one.choices for one in space.values()
    ]
    for corner in itertools.product(*ends):
        point = dict(zip(space, corner, strict=True))
        try:
            trial_config(config, point, "trial")
        except ConfigError as error:
            raise ConfigError(
                f"the search space contains a point that is not allowed, {point}: {error}"
            ) from error
    trial_config(config, own_point(config), "trial")


def _changed(config: RunConfig, values: Point) -> RunConfig:
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return from_dict(RunConfig, override(to_dict(config), changes))


def _drawn(one: Range, rng: np.random.Generator) -> Any:
    if isinstance(one, FloatDistribution):
        return float(rng.uniform(one.low, one.high))
    return one.choices[int(rng.integers(len(one.choices)))]
