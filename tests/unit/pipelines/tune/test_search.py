"""How a search chooses, without training: a score is a function of point and step."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.errors import ConfigError
from pipelines.tune.methods import FREE, Plan, Ranked, Score, Trial, asha_stops
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
from tests.support.searches import by_chance, config_of, near, run


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
