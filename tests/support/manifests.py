"""The files of cluster/ as trees, which tests read, change and search."""

import copy
import functools
import re
import shutil
import subprocess
import tempfile
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
    name, _, tag = image.rpartition("/")[2].partition(":")
    if not re.match(r"\d+\.\d+", tag):
        yield f"{image} is not pinned"
    if name.startswith("ctmsr-") and tag != VERSION:
        yield f"{image} is not version {VERSION} of this project"


def objects() -> dict[str, Tree]:
    """Every Kubernetes object that is written in a file, by file, kind and name.

    The objects of the folders job and serve get their pods from kustomize: see `rendered`.
    """
    return {
        f"{path.name} {document['kind']} {name_of(document)}": document
        for path in sorted(KUBERNETES.rglob("*.yaml"))
        if path.name != "kustomization.yaml" and path.parent.name not in ("job", "serve")
        for document in load(path)
        if isinstance(document, dict)  # not a patch
    }


@functools.cache
def rendered(folder: str = ".", *components: str) -> dict[str, Tree]:
    """What `kubectl kustomize` makes of a folder of cluster/kubernetes, by kind and name.

    Args:
        folder: Below cluster/kubernetes.
        components: Optional parts to add to those of its kustomization.yaml, before them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copied = shutil.copytree(KUBERNETES, Path(scratch, "kubernetes"))
        file = copied / folder / "kustomization.yaml"
        (tree,) = load(file)
        up = "../" * len(Path(folder).parts)
        tree["components"] = [f"{up}{name}" for name in components] + tree.get("components", [])
        file.write_text(yaml.safe_dump(tree))
        command = ["kubectl", "kustomize", str(file.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {
        f"{document['kind']} {name_of(document)}": document for document in yaml.safe_load_all(done.stdout)
    }


def name_of(document: Tree) -> str:
    metadata: Tree = document["metadata"]
    return str(metadata.get("name") or metadata["generateName"])
