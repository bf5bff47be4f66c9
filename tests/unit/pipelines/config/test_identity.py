"""What a run that began before a setting existed may change."""

from ctmsr.config import to_dict
from pipelines.config.identity import RUN
from pipelines.config.run_config import RunConfig


def test_a_run_without_the_number_of_crops_took_one() -> None:
    now = to_dict(RunConfig())
    before = to_dict(RunConfig())
    del before["data"]["crops_per_picture"]
    before["data"]["order_version"] = 2
    assert RUN.changes(before, now) == []
    now["data"]["crops_per_picture"] = 2
    assert RUN.changes(before, now) == ["data.crops_per_picture: 1 -> 2"]
