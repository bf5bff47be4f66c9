"""What a search tells: its table, its verdict and its plots."""

import random

import numpy as np
import pytest

from ctmsr.image import decode
from pipelines.tune.methods import Ranked
from pipelines.tune.report import importances, plots, table
from pipelines.tune.verdict import chosen, too_few, verdict
from tests.support.searches import Scorer, by_chance, config_of, near, on_pictures, run


def test_the_report_says_what_was_found() -> None:
    config = config_of("tune.num_trials=12")
    ranked = run(config, on_pictures(1.2), random.Random(0)).ranking()
    lines = table(ranked).splitlines()
    columns = (
        "sigma_max noise_rho res_rho s0 s1 dtm_weight dtm_t_min dtm_t_max steps LPIPS PSNR-Y dB objective"
    )
    assert " ".join(lines[0].split()) == f"trial {columns}"
    assert [line[0] for line in lines] == ["t", "*", *" " * 11]
    assert sum("(own)" in line for line in lines) == 1
    best, gain = ranked[0], ranked[0].score.lpips - 0.2  # the own sigma_max is 1.0
    first, second = verdict(config, ranked).splitlines()
    assert first.startswith(
        f"best: {best.trial.name}, at 5000 CT + 200 DTM steps, on data.val_uri: "
        f"sigma_max {best.trial.point['schedule.sigma_max']:.4g}, noise_rho "
    )
    assert second.startswith(f"against the run's own schedule: LPIPS {gain:+.4f} ± 0.00")
    assert second.endswith(
        f"over 40 pictures (95%, as the best of 11): better. best.json holds {best.trial.name}."
    )
    assert chosen(ranked) is best
    matters = importances(config, ranked)
    assert max(matters, key=lambda key: matters[key]) == "schedule.sigma_max"
    assert sum(matters.values()) == pytest.approx(1)


def own_of(ranked: list[Ranked]) -> Ranked:
    return next(one for one in ranked if one.trial.number == 0)


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (on_pictures(1.2, spread=1.0), " over 40 pictures (95%, as the best of 11): no difference. "),
        (
            on_pictures(1.2, number=4),
            " over 4 pictures, too few to tell trials apart (5 needed in data.val_uri)",
        ),
        (near(1.2), " over 0 pictures, too few "),  # checkpoints from before there were such scores
    ],
)
def test_without_a_difference_the_own_schedule_is_kept(score: Scorer, said: str) -> None:
    config = config_of("tune.num_trials=12")
    ranked = run(config, score, random.Random(0)).ranking()
    best, own = ranked[0], own_of(ranked)
    assert best.objective < own.objective
    assert chosen(ranked) is own
    told = verdict(config, ranked)
    assert f"best: {best.trial.name}, " in told
    assert said in told
    assert told.endswith("best.json keeps the run's own.")
    (marked,) = (line for line in table(ranked).splitlines() if line.startswith("*"))
    assert marked.startswith("* trial-000 (own)")


def test_with_more_trials_to_pick_from_a_gain_must_be_larger() -> None:
    """One that is enough for the better of two is not for the best of many."""
    config = config_of("tune.num_trials=12")
    ranked = run(config, on_pictures(1.2, spread=0.13), random.Random(0)).ranking()
    best, own = ranked[0], own_of(ranked)
    assert chosen([best, own]) is best
    assert chosen(ranked) is own
    assert "over 40 pictures (95%): better." in verdict(config, [best, own])


def test_the_report_says_that_nothing_was_found() -> None:
    config = config_of("schedule.sigma_max=1.2")
    ranked = run(config, on_pictures(1.2), random.Random(0)).ranking()
    assert verdict(config, ranked).startswith("no trial was better than the run's own schedule, at 5000 CT")
    assert chosen(ranked).trial.number == 0
    failed = [one for one in ranked if one.trial.number != 0]
    assert verdict(config, failed).endswith("own schedule failed, so there is nothing to compare it with.")
    assert chosen(failed) is failed[0]


def test_too_few_pictures_are_told_before_the_search() -> None:
    assert too_few(4).startswith("warning: data.val_uri has 4 pictures, too few to tell trials apart")
    assert too_few(5) == ""


def test_plots_leave_out_keys_that_did_not_vary() -> None:
    widths = []
    for fixed in ((), ("tune.s0=[3]", "tune.s1=[3]")):
        config = config_of("tune.num_trials=12", "schedule.s0=3", "schedule.s1=3", *fixed)
        ranked = run(config, by_chance, random.Random(0)).ranking()
        keys = {"schedule.s0", "schedule.s1"}
        assert keys & set(importances(config, ranked)) == (set() if fixed else keys)
        widths.append(decode(plots(config, ranked)["parallel.png"], name="").shape[1])
    assert widths[1] < widths[0]


@pytest.mark.parametrize("num_trials", [1, 2, 12])
def test_plots_are_pictures(num_trials: int) -> None:
    config = config_of(f"tune.num_trials={num_trials}")
    ranked = run(config, by_chance, random.Random(0)).ranking()
    pictures = {name: decode(data, name=name) for name, data in plots(config, ranked).items()}
    assert list(pictures) == ["schedules.png", "parallel.png", "importance.png"][: 3 if num_trials > 3 else 2]
    for picture in pictures.values():
        assert min(picture.shape[:2]) > 100
        assert len(np.unique(picture)) > 10
