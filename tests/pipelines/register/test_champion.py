"""One champion in MLflow, whatever happens at once or is killed; on record, and back again."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctmsr.errors import TrackingError
from pipelines.register.promotion import (
    CHALLENGER,
    CHAMPION,
    DECISION,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    rollback,
    settle,
)
from pipelines.register.run import register
from pipelines.tracking.models import load_model
from pipelines.tracking.runs import connect, preflight
from tests.support.registering import (
    PICTURES,
    by_checkpoint,
    register_and_die,
    register_stated,
    warm_processes,
    write_checkpoint,
)


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
    dull = register_stated(registry.uri, registry.checkpoint("dull", lpips=0.3, psnr_y=24.4))
    assert not dull.is_promoted
    assert "a loss of 0.6000, 0.5 allowed" in dull.reason
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
    assert json.loads(tags["gate.bicubic_scores"]) == {"lpips": 0.95, "psnr_y": 24.0, "ssim_y": 0.6}
    assert json.loads(tags["gate.champion_scores"]) == {"lpips": 0.4, "psnr_y": 25.0, "ssim_y": 0.7}
    assert tags["gate.champion"] == "1"
    assert (tags["gate.set_version"], tags["gate.protocol"]) == ("a", "as stated")
    assert json.loads(tags["gate.rule"])["margin"] == 0.002
    assert time.strptime(tags["gate.decided_at"], "%Y-%m-%dT%H:%M:%SZ")


def test_without_one_that_is_as_good_as_bicubic_there_is_no_champion(registry: Registry) -> None:
    noisy = register_stated(registry.uri, registry.checkpoint("noisy", lpips=0.96))
    assert (noisy.version, noisy.is_promoted, noisy.champion) == ("1", False, None)
    assert noisy.reason == "worse than bicubic: lpips 0.9600 against 0.9500; psnr_y 25.0000 against 24.0000"
    blurry = register_stated(registry.uri, registry.checkpoint("blurry", lpips=0.5, psnr_y=23.4))
    assert (blurry.is_promoted, blurry.champion) == (False, None)
    assert "psnr_y 23.4000 against 24.0000, a loss of 0.6000, 0.5 allowed" in blurry.reason
    assert (registry.alias(CHAMPION), registry.alias(CHALLENGER)) == (None, 2)
    with pytest.raises(TrackingError, match="toy has no champion to roll back"):
        rollback(registry.uri, "toy")
    first = register_stated(registry.uri, registry.checkpoint("first", lpips=0.9, psnr_y=23.9))
    assert (first.is_promoted, registry.check_champion()) == (True, 3)
    assert first.reason.startswith("there was no champion, and it is not worse than bicubic: lpips 0.9000")


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
