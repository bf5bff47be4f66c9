"""CI runs the tests on the oldest and on the newest Ray that pyproject.toml allows."""

import re

import yaml

from tests.support.repository import ROOT


def test_ci_tests_both_ends_of_the_releases_of_ray() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = [
        tuple(map(int, text.split("."))) for text in workflow["jobs"]["check"]["strategy"]["matrix"]["ray"]
    ]
    bounds = re.search(r'"ray\[.*\]>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert bounds
    low, high = (tuple(map(int, pair)) for pair in (bounds.groups()[:2], bounds.groups()[2:]))
    assert [one[:2] for one in tested] == [low, (high[0], high[1] - 1)]
