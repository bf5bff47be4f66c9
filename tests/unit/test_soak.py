"""The soak's curves: levels and rates, early and at the end."""

from typing import Any

import pytest

from tests.soak.curves import Held, Sample, curves, grown, table


def sample(minute: int, **held: Any) -> Sample:
    """A sample of a run that goes steadily: 100 steps, 5 rows and 40 requests a minute."""
    fields: dict[str, Any] = {
        "shared_mb": 50.0,
        "stored": 9,
        "step": 100 * minute,
        "rows": 5 * minute,
        "requests": 40 * minute,
    }
    return Sample(minute, {"driver": Held(300, 20, 7, 1)}, **fields | held)


def test_a_steady_run_has_not_grown() -> None:
    found = curves([sample(minute) for minute in range(41)], settled_min=10)
    assert grown(found) == []
    assert found["driver: memory, MB"].early == found["driver: memory, MB"].late == 300
    assert found["requests to S3 per 1 000 samples"].late == pytest.approx(50)
    assert "driver: threads" in table(found)


def test_what_happens_before_it_has_settled_does_not_count() -> None:
    samples = [sample(minute, shared_mb=min(5.0 * minute, 50)) for minute in range(41)]
    assert grown(curves(samples, settled_min=10)) == []


@pytest.mark.parametrize(
    ("late", "name"),
    [
        ({"shared_mb": 52.0}, "object stores, MB"),
        ({"stored": 10}, "objects in the bucket"),
        ({"held": {"driver": Held(310, 20, 7, 1)}}, "driver: memory, MB"),
        ({"held": {"driver": Held(300, 20, 8, 1)}}, "driver: threads"),
        ({"held": {"driver": Held(300, 20, 7, 1), "new": Held(1, 0, 0, 0)}}, "new: memory, MB"),
    ],
)
def test_growth_is_named(late: dict[str, object], name: str) -> None:
    samples = [sample(minute) for minute in range(41)]
    samples[30:] = [Sample(**vars(each) | late) for each in samples[30:]]
    assert grown(curves(samples, settled_min=10)) == [name]


def test_more_requests_a_sample_are_growth() -> None:
    samples = [sample(minute, requests=40 * minute + max(0, minute - 20) ** 2) for minute in range(41)]
    assert grown(curves(samples, settled_min=10)) == ["requests to S3 per 1 000 samples"]


def test_a_run_that_stands_still_is_an_error() -> None:
    samples = [sample(minute, step=min(100 * minute, 2000)) for minute in range(41)]
    with pytest.raises(ValueError, match="no step from minute"):
        curves(samples, settled_min=10)
