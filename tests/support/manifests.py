"""The files of cluster/ as trees, which tests read, change and search."""

import copy
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.repository import ROOT

Tree = dict[str, Any]

CLUSTER = ROOT / "cluster"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
KUBERNETES = CLUSTER / "kubernetes"
JOBS = sorted((KUBERNETES / "jobs").glob("*.yaml"))
SECRET = re.compile(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY)", re.IGNORECASE)
SERVER = "mlflow.yaml Deployment mlflow"


def load(path: Path) -> list[Tree]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def parts(tree: Any, key: str) -> Iterator[Any]:
    """Every value at `key`, at any depth."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from parts(part, key)


def edited(document: Tree, path: str, value: Any) -> Tree:
    """A copy with another value at a path of keys and indices; None removes the key."""
    changed = copy.deepcopy(document)
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place: Any = changed
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


def image_problems(image: str) -> Iterator[str]:
    """What is wrong with the name of an image."""
    tag = image.partition(":")[2]
    if not re.match(r"\d+\.\d+", tag):
        yield f"{image} is not pinned"
    if image.startswith("ctmsr-") and tag != VERSION:
        yield f"{image} is not version {VERSION} of this project"


def objects() -> dict[str, Tree]:
    """Every Kubernetes object of the manifests, by file and kind."""
    files = [*KUBERNETES.glob("*.yaml"), *JOBS]
    return {
        f"{path.name} {document['kind']} {name_of(document)}": document
        for path in files
        if path.name != "kustomization.yaml"
        for document in load(path)
    }


def name_of(document: Tree) -> str:
    metadata: Tree = document["metadata"]
    return str(metadata.get("name") or metadata["generateName"])
