"""The Dockerfiles of cluster/, by a linter, and the lists of packages that they install."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.support.manifests import CLUSTER
from tests.support.repository import ROOT

DOCKERFILES = [CLUSTER / "Dockerfile", CLUSTER / "mlflow/Dockerfile"]


def hadolint(dockerfile: str) -> str:
    """What the linter says to a Dockerfile: nothing, if all is well."""
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    done = subprocess.run([program, "-"], input=dockerfile, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=str)
def test_images_are_pinned_and_not_root(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["python:3.11.14-slim-bookworm"]
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "1000:1000"
    assert all("--require-hashes" in line for line in text.splitlines() if line.startswith("RUN pip"))
    assert hadolint(text) == ""


def test_the_linter_sees_an_image_that_is_not_pinned() -> None:
    assert "DL3007" in hadolint("FROM python:latest\n")


def test_the_image_gets_what_it_copies() -> None:
    admitted = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = re.findall(r"^COPY (\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) == admitted
    assert all((ROOT / name).exists() for name in copied if not name.endswith(".lock"))


LOCKED = {ROOT / "requirements.txt": CLUSTER / "requirements.lock"} | {
    CLUSTER / "mlflow/requirements.txt": CLUSTER / "mlflow/requirements.lock"
}


@pytest.mark.parametrize(("asked", "lock"), LOCKED.items(), ids=str)
def test_what_images_install_is_locked_and_what_is_asked_for(asked: Path, lock: Path) -> None:
    pins = re.findall(
        r"^([a-z0-9._-]+)(?:\[.*\])?==(\S+) \\\n +--hash=sha256:", lock.read_text(), re.MULTILINE
    )
    versions = dict(pins)
    assert len(versions) == len(re.findall("^[a-z]", lock.read_text(), re.MULTILINE))  # each has a hash
    for name, specifier in requirements(asked).items():
        version = versions[canonicalize_name(name)]
        assert specifier.contains(version), f"{name} {version} is not {specifier}: run sh cluster/lock.sh"


def test_the_image_brings_cuda() -> None:
    """A lock made where torch is installed without CUDA would make an image without it."""
    assert re.search(r"^nvidia-nccl\S*==", (CLUSTER / "requirements.lock").read_text(), re.MULTILINE)


def requirements(path: Path) -> dict[str, SpecifierSet]:
    """What a requirements.txt asks for, by package."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def test_the_mlflow_server_is_of_the_clients_series() -> None:
    server, client = (
        requirements(CLUSTER / "mlflow/requirements.txt"),
        requirements(ROOT / "requirements.txt"),
    )
    assert {name: server[name] for name in ("mlflow", "boto3")} == {
        name: client[name] for name in ("mlflow", "boto3")
    }
