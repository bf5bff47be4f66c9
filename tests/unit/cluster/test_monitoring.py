"""The alerts and the dashboard are such that Prometheus and Grafana take them; whether alerts fire is in
tests/monitoring, and whether a run exports what they ask for in tests/pipelines/train/test_train.py."""

import re
from typing import Any

import promql_parser
import pytest

from tests.support.manifest_problems import problems
from tests.support.manifests import edited, objects
from tests.support.monitoring import VARIABLE, dashboard, expressions, metrics, rules
from tests.support.repository import ROOT

RULES = "rules.yaml PrometheusRule ctmsr"


@pytest.mark.parametrize("text", expressions())
def test_prometheus_can_read_an_expression(text: str) -> None:
    promql_parser.parse(text)


def test_an_expression_that_prometheus_cannot_read_is_seen() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("max by (run (ray_ctmsr_step)")


def test_all_metrics_are_of_this_project() -> None:
    assert len(metrics()) > 15
    assert {name for name in metrics() if not name.startswith("ctmsr_")} == set()


def test_every_alert_says_what_to_do_and_for_which_run() -> None:
    settings = (ROOT / "docs/operations.md").read_text()
    for rule in rules():
        assert "{{ $labels.run }}" in rule["annotations"]["summary"], rule["alert"]
        assert len(rule["annotations"]["runbook"].split()) > 8, rule["alert"]
        assert f"`{rule['alert']}`" in settings, rule["alert"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec/groups/0/rules/0/annotations/runbook", None, "'runbook' is a required property"),
        ("spec/groups/0/rules/0/for", "10 minutes", "does not match"),
        ("spec/groups/0/rules/0/expression", "1", "'expression' was unexpected"),
    ],
)
def test_a_broken_alert_is_refused(path: str, value: Any, message: str) -> None:
    found = problems(edited(objects()[RULES], path, value))
    assert any(message in text for text in found), found


def test_panels_do_not_overlap_and_show_the_chosen_runs() -> None:
    shown = dashboard()
    places = [panel["gridPos"] for panel in shown["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
    asked = [target["expr"] for panel in shown["panels"] for target in panel["targets"]]
    assert all(text.count(VARIABLE) == len(re.findall(r"ray_ctmsr_\w+", text)) for text in asked)
    assert {variable["name"] for variable in shown["templating"]["list"]} == {"datasource", "run"}
    assert len({panel["id"] for panel in shown["panels"]}) == len(shown["panels"])
