"""Whether a search has found a better schedule than the run's own, as far as the pictures can show."""

from collections.abc import Sequence

from ctmsr.metrics.paired import CONFIDENCE, MIN_PICTURES, Interval, paired_interval

from ..config.run_config import RunConfig
from .methods import Ranked


def too_few(num_pictures: int) -> str:
    """A warning before a search that cannot recommend anything; empty if there are enough pictures."""
    if num_pictures >= MIN_PICTURES:
        return ""
    return (
        f"warning: data.val_uri has {num_pictures} pictures, too few to tell trials apart: best.json will "
        f"keep the run's own schedule. At least {MIN_PICTURES} are needed, and dozens for small gains."
    )


def is_own(one: Ranked) -> bool:
    """Whether it is the trial of the run's own schedule."""
    return one.trial.number == 0


def chosen(trials: Sequence[Ranked]) -> Ranked:
    """The trial whose schedule a search recommends, from trials ranked best first.

    The best trial if it beats the run's own by more than the choice of pictures can explain, or if the run's
    own failed; otherwise the run's own.
    """
    own = _own(trials)
    gain = _gain(trials)
    is_better = gain is not None and not gain.holds_zero
    return trials[0] if own is None or is_better else own


def verdict(config: RunConfig, trials: Sequence[Ranked]) -> str:
    """Lines of text: the best trial, and what it gained over the run's own schedule."""
    tune, best, own = config.tune, trials[0], _own(trials)
    budget = f"at {tune.ct_steps} CT + {tune.dtm_steps} DTM steps, on data.val_uri"
    if best is own:
        return f"no trial was better than the run's own schedule, {budget}: best.json holds the run's own."
    values = ", ".join(f"{key.rpartition('.')[2]} {value:.4g}" for key, value in best.trial.point.items())
    lines = [f"best: {best.trial.name}, {budget}: {values}; LPIPS {best.score.lpips:.4f}"]
    if own is None:
        lines.append("the run's own schedule failed, so there is nothing to compare it with.")
        return "\n".join(lines)
    gain = _gain(trials)
    against = f"against the run's own schedule: LPIPS {best.score.lpips - own.score.lpips:+.4f}"
    if gain is None:
        lines.append(
            f"{against} over {len(_differences(best, own))} pictures, too few to tell trials apart "
            f"({MIN_PICTURES} needed in data.val_uri): best.json keeps the run's own."
        )
        return "\n".join(lines)
    others = f", as the best of {len(trials) - 1}" if len(trials) > 2 else ""
    found = f"{against} ± {gain.half_width:.4f} over {gain.num_pictures} pictures ({CONFIDENCE:.0%}{others})"
    if gain.holds_zero:
        lines.append(f"{found}: no difference. best.json keeps the run's own.")
    else:
        lines.append(f"{found}: better. best.json holds {best.trial.name}.")
    return "\n".join(lines)


def _own(trials: Sequence[Ranked]) -> Ranked | None:
    """The trial of the run's own schedule; None if it failed."""
    return next((one for one in trials if is_own(one)), None)


def _gain(trials: Sequence[Ranked]) -> Interval | None:
    """LPIPS of the best trial minus LPIPS of the run's own; None if too few pictures have both."""
    own = _own(trials)
    if own is None or own is trials[0]:
        return None
    return paired_interval(_differences(trials[0], own), num_compared=len(trials) - 1)


def _differences(one: Ranked, other: Ranked) -> list[float]:
    """LPIPS differences by picture; empty if a checkpoint of an earlier version has no such scores."""
    pairs = (one.score.lpips_by_picture, other.score.lpips_by_picture)
    return [a - b for a, b in zip(*pairs, strict=True)] if all(pairs) else []
