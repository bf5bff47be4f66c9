"""How a search chooses and what it tells, without training: a score is a function of point and step."""

import itertools
import json
import random
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.config import from_dict, override, to_dict
from ctmsr.errors import ConfigError
from ctmsr.image import decode
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig
from pipelines.tune.methods import FREE, Plan, Ranked, Score, Trial, asha_stops
from pipelines.tune.report import importances, plots, table
from pipelines.tune.space import (
    check_space,
    is_inside,
    own_point,
    perturbed,
    random_point,
    report_steps,
    search_space,
    trial_config,
)
from pipelines.tune.verdict import chosen, too_few, verdict

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


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from([*FREE]),
    num_trials=st.integers(1, 14),
    max_concurrent=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    order=st.randoms(use_true_random=False),
    failing=st.integers(0, 4),
)
def test_a_seed_gives_the_same_search_whatever_ends_first_and_however_often_it_is_killed(
    method: str, num_trials: int, max_concurrent: int, seed: int, order: random.Random, failing: int
) -> None:
    settings = [f"tune.method={method}", f"tune.num_trials={num_trials}", f"seed={seed}"]
    config = config_of(*settings, f"tune.max_concurrent={max_concurrent}")

    def score(trial: Trial, step: int) -> Score | None:
        return None if failing and trial.number % 5 == failing and step > 2_000 else by_chance(trial, step)

    whole = run(config, score, random.Random(0))
    other = run(config, score, order, kill_share=0.1)
    assert other.ranking() == whole.ranking()
    assert other.trials == whole.trials
    if method == "asha":  # decides as if trials came one by one
        one_by_one = config_of(*settings, "tune.max_concurrent=1")
        assert run(one_by_one, score, random.Random(0)).ranking() == whole.ranking()


def test_asha_keeps_the_better_half_of_those_before() -> None:
    values: list[dict[int, float]] = [{1: 5, 2: 1, 4: 9}, {1: 6}, {1: 4, 2: 2}, {1: 1, 2: 0, 4: 0}]
    assert asha_stops(values, [False] * 4, rungs=[1, 2]) == {1: 1, 2: 2}


def test_asha_does_not_decide_before_it_knows() -> None:
    values: list[dict[int, float]] = [{1: 1}, {}, {1: 2, 2: 9, 4: 9}]
    assert asha_stops(values, [False] * 3, rungs=[1, 2]) == {}
    assert asha_stops(values, [False, True, False], rungs=[1, 2]) == {2: 1}  # the second failed
    values[1] = {2: 3}  # a preemption took the score of step 1
    assert asha_stops(values, [False] * 3, rungs=[1, 2]) == {2: 1}


def test_what_a_trial_loses_in_psnr_counts_against_it() -> None:
    config = config_of("tune.max_psnr_loss_db=0.5")
    plan = Plan(config)
    plan.extend()
    own, other, blurry = plan.trials[:3]
    plan.scores = {own.name: {7: Score(0.5, 25.0)}, other.name: {7: Score(0.4, 24.6)}}
    assert plan.objective(plan.scores[own.name][7], 7) == 0.5
    assert plan.objective(plan.scores[other.name][7], 7) == 0.4
    assert plan.objective(Score(0.2, 24.1), 7) == pytest.approx(0.6)  # 0.4 dB below the floor
    assert plan.objective(Score(0.2, 24.1), 8) == 0.2  # the first trial is not there yet
    assert blurry.point != other.point


def test_equal_trials_are_ranked_by_psnr() -> None:
    config = config_of("tune.num_trials=3", "tune.method=tpe")
    psnr = {0: 25.0, 1: 25.2, 2: 25.1}
    plan = run(config, lambda trial, step: Score(0.5, psnr[trial.number]), random.Random(0))
    assert [one.trial.number for one in plan.ranking()] == [1, 2, 0]


@pytest.mark.parametrize("method", [*FREE])
def test_the_first_trial_is_the_own_schedule_to_its_end(method: str) -> None:
    config = config_of(f"tune.method={method}", "tune.num_trials=8", "tune.sigma_max=[0.5, 0.9]")
    worst = run(config, near(0.6), random.Random(0)).ranking()[-1 if method != "asha" else slice(None)]
    own = worst if isinstance(worst, Ranked) else next(one for one in worst if one.trial.number == 0)
    assert own.trial.number == 0
    assert own.trial.point == own_point(config)  # sigma_max 1.0: outside the range
    assert own.step == 5_200


def test_asha_saves_steps() -> None:
    config = config_of("tune.num_trials=40")
    ranked = run(config, by_chance, random.Random(0)).ranking()
    assert len(ranked) == 40
    assert sum(one.step for one in ranked) < 0.65 * 40 * 5_200
    assert {one.step for one in ranked} == {1_300, 2_600, 5_200}


def test_tpe_aims() -> None:
    def distance(method: str) -> float:
        config = config_of(f"tune.method={method}", "tune.num_trials=40", "tune.max_concurrent=4")
        trials = run(config, near(1.2), random.Random(0)).trials
        return float(np.mean([near(1.2)(trial, 0).lpips for trial in trials[20:]]))  # type: ignore[union-attr]

    assert distance("tpe") < 0.5 * distance("asha")


def test_pbt_goes_on_from_the_best() -> None:
    config = config_of("tune.method=pbt", "tune.num_trials=8")
    plan = run(config, near(1.2), random.Random(0))
    generations = [
        [trial for trial in plan.trials if trial.stop_step == step] for step in report_steps(config.tune)
    ]
    assert [len(generation) for generation in generations] == [8] * 4
    for before, after in itertools.pairwise(generations):
        ranked = sorted(before, key=lambda trial: near(1.2)(trial, 0).lpips)  # type: ignore[union-attr]
        best, worst = ranked[:2], [trial for trial in ranked[-2:] if trial.number != 0]
        for trial in after:
            (parent,) = (one for one in before if one.name == trial.parent)
            assert trial.start_step == parent.stop_step
            if trial.number in [one.number for one in worst]:
                assert parent in best
                assert trial.name.endswith(f"-from-{parent.number:03d}")
                assert is_inside(trial.point, search_space(config.tune))
            else:
                assert (parent.number, parent.point) == (trial.number, trial.point)
    assert len({trial.name for trial in plan.trials}) == 32


def test_a_search_whose_trials_all_fail_ends() -> None:
    for method in FREE:
        plan = run(config_of(f"tune.method={method}"), lambda trial, step: None, random.Random(0))
        assert plan.ranking() == []
        assert len(plan.failed) == 12


def test_points_are_of_the_space_and_become_runs() -> None:
    config = config_of()
    check_space(config)
    space = search_space(config.tune)
    assert list(space) == [
        *(f"schedule.{name}" for name in ("sigma_max", "noise_rho", "res_rho", "s0", "s1")),
        *(f"loss.{name}" for name in ("dtm_weight", "dtm_t_min", "dtm_t_max")),
    ]
    points = [random_point(config, number) for number in range(50)]
    rng = np.random.default_rng(0)
    for point in points + [perturbed(config, point, rng) for point in points]:
        assert is_inside(point, space)
        trial = trial_config(config, point, "trial")
        assert trial.schedule.sigma_max == point["schedule.sigma_max"]
        assert trial.loss.dtm_weight == point["loss.dtm_weight"]
        assert trial.optim.total_steps == 5_200
    assert points[3] == random_point(config, 3) != random_point(config_of("seed=1"), 3)
    assert {point["schedule.s0"] for point in points} == {3, 4, 5, 6}


def test_a_key_that_is_not_varied_keeps_the_own_value() -> None:
    config = config_of("tune.s0=[]", "tune.dtm_t_max=[]", "schedule.s0=5", "loss.dtm_t_max=0.7")
    assert "schedule.s0" not in random_point(config, 1)
    trial = trial_config(config, random_point(config, 1), "trial")
    assert (trial.schedule.s0, trial.loss.dtm_t_max) == (5, 0.7)
    assert list(search_space(config_of(preset="small").tune))[-1] == "schedule.s1"  # its trials do no DTM


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tune.dtm_t_max=[0.2, 0.5]"], "leave no step to compare on a trajectory of 3 steps"),
        (["tune.dtm_t_min=[0.1, 0.7]"], "must satisfy 0 <= min < max <= 1, got 0.7 and 0.5"),
        (
            ["tune.dtm_steps=0"],
            "with tune.dtm_steps=0, tune.dtm_weight, tune.dtm_t_min, tune.dtm_t_max have no effect",
        ),
        (["tune.dtm_weight=[1]"], "tune.dtm_weight must be an increasing range"),
        (["tune.method=grid"], "tune.method must be one of 'asha', 'tpe', 'pbt', got 'grid'"),
        (
            [f"tune.{name}=[]" for name in ("sigma_max", "noise_rho", "res_rho", "s0", "s1")]
            + [f"tune.{name}=[]" for name in ("dtm_weight", "dtm_t_min", "dtm_t_max")],
            "the search space is empty",
        ),
    ],
)
def test_a_space_that_holds_a_mistake(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(config_of(*settings))


@pytest.mark.parametrize(
    ("total", "steps"), [(1, [1]), (2, [1, 2]), (5, [2, 4, 5]), (16, [4, 8, 12, 16]), (18, [5, 10, 15, 18])]
)
def test_reports_are_even_and_the_last_is_at_the_end(total: int, steps: list[int]) -> None:
    assert report_steps(config_of(f"tune.ct_steps={total}", preset="small").tune) == steps


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
