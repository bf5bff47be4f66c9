"""The search space: which keys of a run's config a search varies and within what, and points in it.

The ranges are fields of TuneConfig, beside the config that they vary. A point becomes a run through the
loader that every config passes (`trial_config`): no trial reaches a value that the command line would refuse.
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
"""The config key that each range or list of choices in TuneConfig is of."""
CHOICES = ("s0", "s1")
NUM_REPORTS = 4
"""Evaluations of a trial, evenly over its steps."""


def search_space(tune: TuneConfig) -> dict[str, Range]:
    """What may be drawn, by config key."""
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
    """The point of trial `number`, uniform in the space: a function of that and the run's seed alone."""
    rng = np.random.default_rng([config.seed, number])
    return {key: _drawn(one, rng) for key, one in search_space(config.tune).items()}


def perturbed(config: RunConfig, point: Point, rng: np.random.Generator) -> Point:
    """A point nearby: each range moved by a fifth of its width, one choice in four drawn anew."""
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
    """The training run that a trial is.

    All its checkpoints stay, and there is room for those of preemptions: they hold the scores from which a
    search continues.

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
            "train.num_best_kept": 0,
        },
    )


def folder_uri(config: RunConfig) -> str:
    """The search's folder: trials, best config and report."""
    return f"{config.run_uri}-tune"


def report_steps(tune: TuneConfig) -> list[int]:
    """Steps at which a trial is scored: each quarter, and the last."""
    total = tune.ct_steps + tune.dtm_steps
    every = -(-total // NUM_REPORTS)
    return sorted({min(every * quarter, total) for quarter in range(1, NUM_REPORTS + 1)})


def check_space(config: RunConfig) -> None:
    """Builds the config of every corner of the space, so that no trial fails on it later.

    The corners speak for what is between them: every check of these keys is a limit of one of them, or on a
    difference that grows or shrinks steadily with each. All choices are among the corners.

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
                f"the search space holds a point that is not allowed, {point}: {error}"
            ) from error
    trial_config(config, own_point(config), "trial")


def _changed(config: RunConfig, values: Point) -> RunConfig:
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return from_dict(RunConfig, override(to_dict(config), changes))


def _drawn(one: Range, rng: np.random.Generator) -> Any:
    if isinstance(one, FloatDistribution):
        return float(rng.uniform(one.low, one.high))
    return one.choices[int(rng.integers(len(one.choices)))]
