"""The report of a finished search: a table and up to three plots."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ctmsr.model.schedule import trajectory_levels

from ..config.run_config import RunConfig
from .methods import Ranked, study_of
from .space import is_inside, search_space, with_point
from .verdict import chosen, is_own

_COLOURS = colormaps["viridis_r"]
_NAMED_TRIALS = 16
"""Most trials that a plot names, the best ones."""
_LEAST_TRIALS = 4
"""Fewest trials from which to estimate which keys matter."""


def table(trials: Sequence[Ranked]) -> str:
    """The trials as lines of text, best first; `own` marks the run's own point, `*` the one in best.json."""
    kept, keys = chosen(trials), list(trials[0].trial.point)
    names = [key.rpartition(".")[2] for key in keys]
    header = "".join(f"{name:>{_width(name)}}" for name in names)
    lines = [f"{'trial':<24}{header}{'steps':>8}{'LPIPS':>9}{'PSNR-Y dB':>11}{'objective':>11}"]
    for one in trials:
        mark = f"{'*' if one is kept else ' '} {one.trial.name}{' (own)' if is_own(one) else ''}"
        values = "".join(
            f"{one.trial.point[key]:>{_width(name)}.4g}" for key, name in zip(keys, names, strict=True)
        )
        lines.append(
            f"{mark:<24}{values}{one.step:>8}{one.score.lpips:>9.4f}{one.score.psnr_y:>11.2f}{one.objective:>11.4f}"
        )
    return "\n".join(lines)


def plots(config: RunConfig, trials: Sequence[Ranked]) -> dict[str, bytes]:
    """PNG files by name: the schedules tried, parallel coordinates and, given enough trials, importances."""
    files = {"schedules.png": _schedules(config, trials), "parallel.png": _parallel(config, trials)}
    if shares := importances(config, trials):
        files["importance.png"] = _importance(shares)
    return files


def importances(config: RunConfig, trials: Sequence[Ranked]) -> dict[str, float]:
    """How well each key that varies predicts whether a trial is in the better half; they add up to 1.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255) on ranks, as trials were scored at different steps.
    With a dozen trials it is no more than a hint; with fewer than four the result is empty.
    """
    space = search_space(config.tune)
    trials = [one for one in trials if is_inside(one.trial.point, space)]
    if len(trials) < _LEAST_TRIALS:
        return {}
    study = study_of(space, [(one.trial.point, float(rank)) for rank, one in enumerate(trials)])
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, params=_varied(config, trials))


def _varied(config: RunConfig, trials: Sequence[Ranked]) -> list[str]:
    """The keys of which the trials have more than one value."""
    return [key for key in search_space(config.tune) if len({one.trial.point[key] for one in trials}) > 1]


def _schedules(config: RunConfig, trials: Sequence[Ranked]) -> bytes:
    """sigma_t and alpha_t over t, with a dot at every step of the curriculum's final trajectory."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    noise, residual = figure.subplots(1, 2)
    t = np.linspace(0, 1, 101)
    for one in reversed(trials):
        schedule = with_point(config, one.trial.point).schedule
        alphas, sigmas = trajectory_levels(schedule, schedule.s1)
        for axes, levels, curve in (
            (noise, sigmas, schedule.sigma_max * t**schedule.noise_rho),
            (residual, alphas, t**schedule.res_rho),
        ):
            style = _style(trials, one)
            axes.plot(t, curve, label=one.trial.name, **style)
            points = np.linspace(0, 1, len(levels)), levels.numpy()
            axes.plot(*points, **style | {"linestyle": "none", "marker": "o", "markersize": 4})
    noise.set(title="noise level", xlabel="t / N", ylabel="sigma_t")
    residual.set(title="residual weight", xlabel="t / N", ylabel="alpha_t")
    _add_colour_bar(figure, trials, [noise, residual])
    _add_names(figure, trials, noise)
    return _png(figure)


def _parallel(config: RunConfig, trials: Sequence[Ranked]) -> bytes:
    """A line per trial through its values; each axis spans the values tried of a key that varies."""
    keys = _varied(config, trials)
    columns = [[float(one.trial.point[key]) for one in trials] for key in keys]
    columns.append([one.objective for one in trials])
    labels = [*(key.rpartition(".")[2] for key in keys), "objective"]
    figure = Figure(figsize=(1.6 * len(labels) + 4, 4.5), layout="constrained")
    axes = figure.subplots()
    heights = np.array([_scaled(column) for column in columns])
    for number, one in reversed(list(enumerate(trials))):
        axes.plot(heights[:, number], label=one.trial.name, **_style(trials, one))
    ticks = [
        f"{label}\n{min(column):.4g} to {max(column):.4g}"
        for label, column in zip(labels, columns, strict=True)
    ]
    axes.set_xticks(range(len(labels)), ticks, fontsize=8)
    axes.set(title="every trial; higher is larger", yticks=[])
    axes.grid(axis="x")
    _add_colour_bar(figure, trials, axes)
    _add_names(figure, trials, axes)
    return _png(figure)


def _importance(shares: dict[str, float]) -> bytes:
    figure = Figure(figsize=(7, 0.45 * len(shares) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([key.rpartition(".")[2] for key in shares][::-1], list(shares.values())[::-1])
    axes.set(title="importance of each key (PED-ANOVA on ranks)", xlim=(0, 1))
    return _png(figure)


def _style(trials: Sequence[Ranked], one: Ranked) -> dict[str, Any]:
    """Colour by objective; dotted for trials that were stopped early, thick for the best."""
    return {
        "color": _COLOURS(_norm(trials)(one.objective)),
        "linestyle": "-" if one.step == trials[0].step else ":",
        "linewidth": 3.0 if one is trials[0] else 1.2,
    }


def _add_colour_bar(figure: Figure, trials: Sequence[Ranked], axes: Any) -> None:
    bar = figure.colorbar(ScalarMappable(_norm(trials), _COLOURS), ax=axes)
    bar.set_label("objective: lower is better; dotted: stopped early")


def _add_names(figure: Figure, trials: Sequence[Ranked], axes: Axes) -> None:
    """A legend of the best trials, best first."""
    names = [one.trial.name for one in trials[:_NAMED_TRIALS]]
    lines = {line.get_label(): line for line in axes.lines}
    figure.legend([lines[name] for name in names], names, loc="outside right upper", fontsize=7)


def _norm(trials: Sequence[Ranked]) -> Normalize:
    values = [one.objective for one in trials]
    return Normalize(min(values), max(max(values), min(values) + 1e-6))


def _scaled(column: Sequence[float]) -> list[float]:
    """Values scaled to 0 to 1; 0.5 if all are equal."""
    low, high = min(column), max(column)
    return [(value - low) / (high - low) if high > low else 0.5 for value in column]


def _width(name: str) -> int:
    return max(len(name), 8) + 2


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
