"""The alerts and the dashboard of cluster/kubernetes/monitoring, for tests."""

import json
import re
from typing import Any

from tests.support.manifests import KUBERNETES, Tree, load, parts

FOLDER = KUBERNETES / "monitoring"
VARIABLE = '{run=~"$run"}'


def groups() -> Tree:
    """The rules as a Prometheus without the operator reads them."""
    (document,) = load(FOLDER / "rules.yaml")
    return dict(document["spec"])


def rules() -> list[Tree]:
    return [rule for group in groups()["groups"] for rule in group["rules"]]


def dashboard() -> Tree:
    return dict(json.loads((FOLDER / "dashboard.json").read_text()))


def expressions() -> list[str]:
    """Every expression of an alert or of a panel."""
    found: list[Any] = [*parts(rules(), "expr"), *parts(dashboard()["panels"], "expr")]
    return [str(text) for text in found]


def metrics() -> set[str]:
    """Names of the metrics that alerts and panels ask for, without Ray's prefix `ray_`."""
    return {name for text in expressions() for name in re.findall(r"\bray_(\w+)", text)}
