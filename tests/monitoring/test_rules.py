"""Alerts fire when they should, and only then, as Prometheus itself sees it: `make test-monitoring`."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.monitoring import groups, rules

pytestmark = pytest.mark.tier

HEALTHY = {
    "step": "0+50x120",
    "total_steps": "100000x120",
    "step_at_s": "0+60x120",
    "checkpoint_at_s": "0+60x120",
    "checkpoint_interval_s": "600x120",
    "data_wait": "0.05x120",
    "not_finite": "0x120",
    "unreadable_share": "0x120",
    "unreadable_limit": "0.001x120",
}
"""Gauges of a run over two hours, a value a minute, in promtool's notation."""
FAULTS = {
    "CtmsrStalled": {"step_at_s": "0+60x30 1800x90"},
    "CtmsrEndedEarly": {name: f"{values.partition('x')[0]}x30" for name, values in HEALTHY.items()},
    "CtmsrNotFinite": {"not_finite": "0x30 1 stale"},
    "CtmsrStarving": {"data_wait": "0.05x30 0.6x90"},
    "CtmsrCheckpointOld": {"checkpoint_at_s": "0x120"},
    "CtmsrPicturesBreak": {"unreadable_share": "0x30 0.0008x90"},
}
"""What differs from a healthy run when an alert is to fire, an hour after the start."""


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_of(name: str, changed: dict[str, str]) -> list[dict[str, str]]:
    """The series of a run, which started on one node."""
    gauges = HEALTHY | changed
    return [
        {"series": f'ray_ctmsr_{gauge}{{run="{name}", instance="a"}}', "values": values}
        for gauge, values in gauges.items()
    ]


def write(folder: Path, name: str, tree: object) -> str:
    file = folder / name
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    promtool("check", "rules", write(tmp_path, "rules.yaml", groups()))
    assert FAULTS.keys() == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("alert", FAULTS)
def test_an_alert_fires_for_the_run_that_has_the_fault_alone(alert: str, tmp_path: Path) -> None:
    """Of two runs, the other one is healthy; no other alert fires for either."""
    series = run_of("ill", FAULTS[alert]) + run_of("well", {})
    for_run = [{"run": "ill"}]
    expected = [
        {
            "eval_time": "60m",
            "alertname": rule["alert"],
            "exp_alerts": [
                {"exp_labels": labels | rule["labels"]} for labels in for_run if rule["alert"] == alert
            ],
        }
        for rule in rules()
    ]
    # promtool compares annotations, too, and their values are not of interest here.
    plain = groups()
    for group in plain["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    tests = {
        "rule_files": [write(tmp_path, "rules.yaml", plain)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": expected}],
    }
    promtool("test", "rules", write(tmp_path, "tests.yaml", tests))


def test_the_text_of_an_alert_names_the_run(tmp_path: Path) -> None:
    (stalled,) = [rule for rule in rules() if rule["alert"] == "CtmsrStalled"]
    annotations = stalled["annotations"] | {"summary": "ill: no step for 30m 0s"}
    tests = {
        "rule_files": [write(tmp_path, "rules.yaml", groups())],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": run_of("ill", FAULTS["CtmsrStalled"]),
                "alert_rule_test": [
                    {
                        "eval_time": "60m",
                        "alertname": "CtmsrStalled",
                        "exp_alerts": [
                            {"exp_labels": {"run": "ill"} | stalled["labels"], "exp_annotations": annotations}
                        ],
                    }
                ],
            }
        ],
    }
    promtool("test", "rules", write(tmp_path, "tests.yaml", tests))
