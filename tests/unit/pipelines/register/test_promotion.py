"""The gate: its rule, and its loop in every order of steps."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.errors import ConfigError
from pipelines.config.run_config import RegisterConfig
from pipelines.register.promotion import (
    CHALLENGER,
    CHAMPION,
    DECISION,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    Measured,
    Write,
    pending,
    record,
    verdict,
)

RULE = RegisterConfig(margin=0.01, guard_margin=0.2)
BICUBIC = 35 / 256
"""LPIPS of bicubic, where the loop is tested: some of the scores there are worse."""


def measured(
    lpips: float,
    psnr_y: float = 25.0,
    *,
    against: tuple[int, float] | None = None,
    bicubic: tuple[float, float] = (1.0, 24.0),
) -> Measured:
    """LPIPS and PSNR-Y of a version and of bicubic, and the champion's number and LPIPS."""
    champion, champion_lpips = against or (None, 0.0)
    champion_scores = {"lpips": champion_lpips, "psnr_y": 25.0} if against else {}
    scores, baseline = (
        dict(zip(("lpips", "psnr_y"), pair, strict=True)) for pair in ((lpips, psnr_y), bicubic)
    )
    return Measured("a", "words", scores, champion, champion_scores, baseline)


# --- the rule ---


@pytest.mark.parametrize(
    ("lpips", "psnr_y", "passes"),
    [
        (0.35, 25.0, True),
        (0.39, 25.0, True),
        (0.3901, 25.0, False),
        (0.4, 25.0, False),
        (0.45, 30.0, False),
        (0.3, 24.8, True),
        (0.3, 24.7, False),
    ],
)
def test_a_challenger_must_gain_the_margin_and_lose_no_more_than_the_guard(
    lpips: float, psnr_y: float, passes: bool
) -> None:
    tags = record(RULE, measured(lpips, psnr_y, against=(1, 0.4)))
    decided, reason = verdict(tags, 1, {})
    assert decided is passes
    assert f"lpips {lpips:.4f} against 0.4000 of version 1" in reason
    assert "0.01 needed" in reason
    assert f"psnr_y {psnr_y:.4f} against 25.0000" in reason


def test_of_other_scores_more_is_better_and_at_margin_0_any_gain_will_do() -> None:
    rule = RegisterConfig(metric="psnr_y", margin=0, guard="lpips", guard_margin=1)
    for psnr_y, passes in ((25.1, True), (25.0, False), (24.9, False)):
        assert verdict(record(rule, measured(0.5, psnr_y, against=(1, 0.4))), 1, {})[0] is passes


@pytest.mark.parametrize("champion", [None, 1])
@pytest.mark.parametrize(
    ("lpips", "psnr_y", "reason"),
    [
        (0.61, 25.0, "worse than bicubic: lpips 0.6100 against 0.5700; psnr_y 25.0000 against 24.0000"),
        (0.3, 23.7, "worse than bicubic: psnr_y 23.7000 against 24.0000, a loss of 0.3000, 0.2 allowed"),
        (float("nan"), 25.0, "worse than bicubic: lpips nan against 0.5700"),
        (0.3, float("nan"), "worse than bicubic: psnr_y nan against 24.0000"),
        (0.57, 23.8, None),
        (0.5, 30.0, None),
    ],
)
def test_what_is_worse_than_bicubic_is_never_promoted(
    champion: int | None, lpips: float, psnr_y: float, reason: str | None
) -> None:
    """The first needs no margin; the champion that there is in other cases is worse still."""
    scores = measured(lpips, psnr_y, against=(1, 0.9) if champion else None, bicubic=(0.57, 24.0))
    scores = replace(scores, champion_scores={"lpips": 0.9, "psnr_y": 20.0} if champion else {})
    decided, said = verdict(record(RULE, scores), champion, {})
    assert decided is (reason is None)
    if reason:
        assert said.startswith(reason)
    elif champion is None:
        assert said.startswith("there was no champion, and it is not worse than bicubic: lpips ")


def test_the_comparison_with_bicubic_is_by_the_rule_that_was_asked_for() -> None:
    rule = RegisterConfig(metric="psnr_y", guard="lpips", guard_margin=0.1)
    for lpips, psnr_y, passes in ((0.66, 24.1, True), (0.68, 24.1, False), (0.3, 23.9, False)):
        scores = measured(lpips, psnr_y, bicubic=(0.57, 24.0))
        assert verdict(record(rule, scores), None, {})[0] is passes


def test_what_was_recorded_before_bicubic_was_is_compared_with_the_champion_alone() -> None:
    tags = record(RULE, measured(0.8, against=(1, 0.9), bicubic=(0.5, 24.0)))
    del tags["gate.bicubic_scores"]
    assert verdict(tags, 1, {})[0]
    assert verdict(tags, None, {}) == (
        True,
        "there was no champion, and it was not measured against bicubic",
    )


def test_without_scores_it_is_champion_where_there_is_none_and_replaces_nobody() -> None:
    assert verdict(record(RULE, None), None, {}) == (True, "there was no champion, and it was not measured")
    assert verdict(record(RULE, None), 4, {}) == (
        False,
        "it was not measured against version 4, the champion",
    )


def test_a_champion_that_came_meanwhile_counts_if_it_was_measured_on_the_same_pictures() -> None:
    tags = record(RULE, measured(0.3, against=(1, 0.4)))
    assert verdict(tags, 2, record(RULE, measured(0.32)))[0]
    assert not verdict(tags, 2, record(RULE, measured(0.305)))[0]
    other = record(RULE, measured(0.32)) | {"gate.set_version": "b"}
    assert verdict(tags, 2, other) == (
        False,
        "version 2 became champion meanwhile, measured on other pictures (b, not a). Register it again",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": -1.0}, r"register\.margin must be at least 0, got -1\.0"),
        ({"guard": "lpips"}, r"register\.guard must differ from register\.metric, got 'lpips'"),
    ],
)
def test_a_rule_without_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RegisterConfig(**changes)


# --- the loop, in every order of steps ---


@dataclass
class Shelf:
    """The part of a registry that the gate uses, and processes that stop before each of its calls."""

    versions: dict[int, dict[str, str]] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)

    def register(self, lpips: float) -> Iterator[None]:
        yield from self.settle()
        champion = self.aliases.get(CHAMPION)
        yield
        theirs = json.loads(self.versions[champion]["gate.scores"])["lpips"] if champion else 0.0
        scores = measured(lpips, against=(champion, theirs) if champion else None, bicubic=(BICUBIC, 24.0))
        self.versions[len(self.versions) + 1] = record(RULE, scores)
        yield from self.settle()

    def settle(self) -> Iterator[None]:
        while True:
            yield
            versions = {number: dict(tags) for number, tags in self.versions.items()}
            yield
            writes = pending(versions, dict(self.aliases), "now")
            if not writes:
                return
            for write in writes:
                yield
                self.apply(write)

    def rollback(self) -> Iterator[None]:
        yield
        seen = self.aliases.get(CHAMPION)
        yield from self.settle()
        yield
        promoted = self.standing()
        if seen is None or not any(number < seen for number in promoted):
            return
        for number in sorted((n for n in promoted if n >= seen), reverse=True):
            yield
            self.apply(Write(number, ROLLED_BACK, "now"))
        yield from self.settle()

    def apply(self, write: Write) -> None:
        if write.value is None:
            self.aliases[write.name] = write.version
        else:
            self.versions[write.version][write.name] = write.value

    def standing(self) -> list[int]:
        return [n for n, t in self.versions.items() if t.get(DECISION) == PROMOTED and ROLLED_BACK not in t]


def queue(lpips: list[float]) -> int | None:
    """The champion of registrations one after another."""
    champion = None
    for number, ours in enumerate(lpips, 1):
        if ours <= BICUBIC and (champion is None or lpips[champion - 1] - ours >= RULE.margin):
            champion = number
    return champion


SCORES = st.lists(st.integers(0, 40).map(lambda i: i / 256), min_size=1, max_size=4)
STEPS = st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=150)


@settings(deadline=None)
@given(SCORES, STEPS, st.sets(st.integers(0, 4), max_size=2))
def test_registrations_in_any_order_of_steps_end_as_a_queue_would(
    scores: list[float], steps: list[tuple[int, bool]], killed: set[int]
) -> None:
    """A process in `killed` ends at some step: whatever it leaves, the next one to come makes whole."""
    shelf = Shelf()
    running = {number: shelf.register(lpips) for number, lpips in enumerate(scores)}
    for number, dies in steps:
        if number in running and next(running[number], "ended") == "ended":
            del running[number]
        if dies and number in killed:
            running.pop(number, None)
        champion = shelf.aliases.get(CHAMPION)
        assert champion is None or champion in shelf.standing()
    for process in running.values():
        for _ in process:
            pass
    for _ in shelf.settle():
        pass
    registered = [json.loads(tags["gate.scores"])["lpips"] for tags in shelf.versions.values()]
    if registered:
        assert shelf.aliases.get(CHAMPION) == queue(registered)
        refused = [n for n, tags in shelf.versions.items() if tags[DECISION] == REFUSED]
        assert shelf.aliases.get(CHALLENGER) == max(refused, default=None)


@settings(deadline=None)
@given(SCORES, STEPS)
def test_what_was_rolled_back_is_never_champion_again(
    scores: list[float], steps: list[tuple[int, bool]]
) -> None:
    shelf = Shelf()
    for lpips in (BICUBIC, BICUBIC - 0.02):
        for _ in shelf.register(lpips):
            pass
    running = {number: shelf.register(lpips) for number, lpips in enumerate(scores)}
    running[4] = shelf.rollback()
    for number, _ in steps:
        if number in running and next(running[number], "ended") == "ended":
            del running[number]
    for process in running.values():
        for _ in process:
            pass
    assert shelf.aliases[CHAMPION] == max(shelf.standing())
    assert any(ROLLED_BACK in tags for tags in shelf.versions.values())


def test_a_champion_from_before_the_gate_counts_and_versions_made_by_other_means_do_not() -> None:
    shelf = Shelf({1: {}, 2: {"proven": "true"}, 3: {}}, {CHAMPION: 2})
    for _ in shelf.settle():
        pass
    assert shelf.versions[2][DECISION] == PROMOTED
    assert shelf.versions[2]["gate.reason"] == "it was the champion before the gate existed"
    assert shelf.versions[1] == shelf.versions[3] == {}
    assert shelf.aliases == {CHAMPION: 2}
