"""The files of cluster/ as trees, for tests: read, changed, and searched."""

import copy
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .child import ROOT

Tree = dict[str, Any]

CLUSTER = ROOT / "cluster"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


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
    """A copy with another value at a path of keys and indices; None takes the key away."""
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
