"""The gate: one champion whatever happens at once or is killed, by the rule, on record, and back again."""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.errors import ConfigError, TrackingError
from pipelines.config import RegisterConfig
from pipelines.gate import (
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
    rollback,
    settle,
    verdict,
)
from pipelines.register import register
from pipelines.registry import load_model
from pipelines.tracking import connect, preflight
from tests.registering import (
    PICTURES,
    by_checkpoint,
    register_and_die,
    register_stated,
    warm_processes,
    write_checkpoint,
)

RULE = RegisterConfig(margin=0.01, guard_margin=0.2)


def measured(lpips: float, psnr_y: float = 25.0, *, against: tuple[int, float] | None = None) -> Measured:
    champion, champion_lpips = against or (None, 0.0)
    champion_scores = {"lpips": champion_lpips, "psnr_y": 25.0} if against else {}
    return Measured("a", "words", {"lpips": lpips, "psnr_y": psnr_y}, champion, champion_scores)


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
        (float("nan"), 25.0, False),
        (0.3, float("nan"), False),
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


def test_without_a_champion_proof_is_enough_and_without_scores_it_takes_no_place() -> None:
    assert verdict(record(RULE, None), None, {}) == (
        True,
        "there was no champion, and it gives the bytes of its checkpoint",
    )
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
        ({"guard": "lpips"}, r"register\.guard must be another score than register\.metric, got 'lpips'"),
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
        scores = measured(lpips, against=(champion, theirs) if champion else None)
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


def queue(lpips: list[float]) -> int:
    """The champion of registrations one after another."""
    champion = 1
    for number in range(2, len(lpips) + 1):
        gain = lpips[champion - 1] - lpips[number - 1]
        if gain >= RULE.margin:
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
        assert shelf.aliases[CHAMPION] == queue(registered)
        refused = [n for n, tags in shelf.versions.items() if tags[DECISION] == REFUSED]
        assert shelf.aliases.get(CHALLENGER) == max(refused, default=None)


@settings(deadline=None)
@given(SCORES, STEPS)
def test_what_was_rolled_back_is_never_champion_again(
    scores: list[float], steps: list[tuple[int, bool]]
) -> None:
    shelf = Shelf()
    for lpips in (0.5, 0.4):
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
    assert shelf.versions[2]["gate.reason"] == "it was the champion before there was a gate"
    assert shelf.versions[1] == shelf.versions[3] == {}
    assert shelf.aliases == {CHAMPION: 2}


# --- in MLflow, on sqlite ---


@dataclass(frozen=True)
class Registry:
    uri: str
    folder: Path

    def checkpoint(self, name: str, lpips: float, psnr_y: float = 25.0) -> Path:
        """A checkpoint with weights of its own."""
        seed = len(list(self.folder.glob("checkpoint-*")))
        return write_checkpoint(self.folder / f"checkpoint-{name}", seed, lpips=lpips, psnr_y=psnr_y)

    def alias(self, alias: str) -> int | None:
        version = connect(self.uri).get_registered_model("toy").aliases.get(alias)
        return None if version is None else int(version)

    def tags(self, version: int | str) -> dict[str, str]:
        return dict(connect(self.uri).get_model_version("toy", str(version)).tags)

    def versions(self) -> list[int]:
        found = connect(self.uri).search_model_versions("name='toy'")
        return sorted(int(version.version) for version in found)

    def check_champion(self) -> int:
        """The champion loads, and gives the bytes of the checkpoint that it says it is."""
        champion = self.alias(CHAMPION)
        assert champion is not None
        tags = self.tags(champion)
        assert tags["proven"] == "true"
        assert tags[DECISION] == PROMOTED
        model = load_model(self.uri, "models:/toy@champion")
        assert np.array_equal(model.predict(PICTURES), by_checkpoint(Path(tags["checkpoint"])))
        return champion


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(preflight(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)


@pytest.fixture(scope="module")
def processes() -> Any:
    return warm_processes()


def test_a_worse_challenger_is_refused_and_a_better_one_promoted_on_record(registry: Registry) -> None:
    first = register_stated(registry.uri, registry.checkpoint("first", lpips=0.4))
    assert (first.version, first.is_promoted, first.champion) == ("1", True, "1")
    worse = register_stated(registry.uri, registry.checkpoint("worse", lpips=0.41))
    assert (worse.version, worse.is_promoted, worse.champion) == ("2", False, "1")
    assert (registry.alias(CHAMPION), registry.alias(CHALLENGER)) == (1, 2)
    dull = register_stated(registry.uri, registry.checkpoint("dull", lpips=0.3, psnr_y=24.7))
    assert not dull.is_promoted
    assert "a loss of 0.3000, 0.2 allowed" in dull.reason
    better = register_stated(registry.uri, registry.checkpoint("better", lpips=0.39))
    assert (better.version, better.is_promoted, better.champion) == ("4", True, "4")
    assert registry.check_champion() == 4
    assert registry.alias(CHALLENGER) == 3

    tags = registry.tags(2)
    assert tags[DECISION] == REFUSED
    assert tags["gate.reason"] == worse.reason
    assert worse.reason.startswith(
        "lpips 0.4100 against 0.4000 of version 1: a gain of -0.0100, 0.002 needed"
    )
    assert json.loads(tags["gate.scores"]) == {"lpips": 0.41, "psnr_y": 25.0, "ssim_y": 0.7}
    assert json.loads(tags["gate.champion_scores"]) == {"lpips": 0.4, "psnr_y": 25.0, "ssim_y": 0.7}
    assert tags["gate.champion"] == "1"
    assert (tags["gate.set_version"], tags["gate.protocol"]) == ("a", "as stated")
    assert json.loads(tags["gate.rule"])["margin"] == 0.002
    assert time.strptime(tags["gate.decided_at"], "%Y-%m-%dT%H:%M:%SZ")


def test_a_version_that_was_not_measured_replaces_nothing(registry: Registry) -> None:
    register_stated(registry.uri, registry.checkpoint("first", lpips=0.4))
    arguments: dict[str, Any] = {"model_name": "toy", "run_id": None, "metrics": {}, "tags": {}}
    folder = registry.checkpoint("next", lpips=0.1)
    decision = register(folder, tracking_uri=registry.uri, **arguments)
    assert not decision.is_promoted
    assert decision.reason == "it was not measured against version 1, the champion"


def test_rollback_returns_to_the_champion_before_and_what_was_rolled_back_stays_so(
    registry: Registry,
) -> None:
    with pytest.raises(TrackingError, match=r"cannot roll back toy: .*toy not found"):
        rollback(registry.uri, "toy")
    register_stated(registry.uri, registry.checkpoint("one", lpips=0.4))
    with pytest.raises(TrackingError, match="version 1 is the first champion of toy"):
        rollback(registry.uri, "toy")
    register_stated(registry.uri, registry.checkpoint("two", lpips=0.3))
    register_stated(registry.uri, registry.checkpoint("three", lpips=0.35))  # beats the first, not the second
    assert rollback(registry.uri, "toy") == ([2], 1)
    assert registry.check_champion() == 1
    assert ROLLED_BACK in registry.tags(2)
    settle(connect(registry.uri), "toy")
    later = register_stated(registry.uri, registry.checkpoint("four", lpips=0.45))
    assert not later.is_promoted
    assert registry.check_champion() == 1
    again = register_stated(registry.uri, registry.checkpoint("five", lpips=0.38))
    assert (again.is_promoted, registry.check_champion()) == (True, 5)
    assert rollback(registry.uri, "toy") == ([5], 1)


def test_registrations_at_once_leave_one_champion_as_a_queue_would(
    registry: Registry, processes: Any
) -> None:
    register_stated(registry.uri, registry.checkpoint("first", lpips=0.5))
    scores = {f"c{i}": lpips for i, lpips in enumerate((0.4, 0.401, 0.399, 0.3))}
    folders = [registry.checkpoint(name, lpips=lpips) for name, lpips in scores.items()]
    started = [processes.Process(target=register_stated, args=(registry.uri, folder)) for folder in folders]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * 4
    assert registry.versions() == [1, 2, 3, 4, 5]
    order = [json.loads(registry.tags(v)["gate.scores"])["lpips"] for v in registry.versions()]
    expected = 1
    for number, lpips in enumerate(order[1:], 2):
        if order[expected - 1] - lpips >= 0.002:
            expected = number
    assert registry.check_champion() == expected
    assert all(registry.tags(v)[DECISION] in (PROMOTED, REFUSED) for v in registry.versions())


@pytest.mark.slow
def test_killed_before_any_write_the_champion_is_valid(registry: Registry, processes: Any) -> None:
    """Each round dies one write later, until one gets through."""
    register_stated(registry.uri, registry.checkpoint("first", lpips=0.9))
    seen = {1}
    for num_writes in range(100):
        folder = registry.checkpoint(f"c{num_writes}", lpips=0.8 - num_writes / 100)
        process = processes.Process(target=register_and_die, args=(registry.uri, folder, num_writes))
        process.start()
        process.join(120)
        seen.add(registry.check_champion())
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
    assert num_writes >= 10
    assert len(seen) >= 3  # killed after its version was made, it is promoted by the next one
    assert registry.check_champion() == max(registry.versions())


@pytest.mark.slow
def test_killed_at_random_times_the_champion_is_valid(registry: Registry, processes: Any) -> None:
    register_stated(registry.uri, registry.checkpoint("first", lpips=0.9))
    started = time.monotonic()
    register_stated(registry.uri, registry.checkpoint("second", lpips=0.85))
    lasts = time.monotonic() - started
    moments = random.Random(0)
    for number in range(12):
        folder = registry.checkpoint(f"c{number}", lpips=0.8 - number / 100)
        process = processes.Process(target=register_stated, args=(registry.uri, folder))
        process.start()
        time.sleep(moments.uniform(0, 1.5 * lasts))
        process.kill()
        process.join(60)
        registry.check_champion()
    assert register_stated(registry.uri, registry.checkpoint("last", lpips=0.1)).is_promoted
    assert registry.check_champion() == max(registry.versions())
