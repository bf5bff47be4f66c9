"""`pip install .`: what is in the package, and its commands in a folder where the repository is not."""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines.__main__ import COMMANDS
from tests.support.repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("ctmsr", "pipelines")
SLOW_TO_IMPORT = {"mlflow", "ray", "torch"}
LIMIT_S = 100


@dataclass(frozen=True)
class Installed:
    """The package without its dependencies, which it takes from the environment of the tests."""

    folder: Path
    empty: Path
    """Where its commands run."""

    def run(self, *arguments: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Starts `ctmsr ARGUMENTS`, with `under` among Python's own options."""
        return subprocess.run(
            [sys.executable, *under, self.folder / "bin" / "ctmsr", *arguments],
            cwd=self.empty,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """From a copy, since setuptools leaves its build in the source, where it would hide what is left out."""
    base = tmp_path_factory.mktemp("package")
    source, folder, empty = base / "source", base / "installed", base / "empty"
    source.mkdir()
    empty.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return Installed(folder, empty)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_the_clone_is_installed(installed: Installed, package: str) -> None:
    def files(root: Path) -> dict[str, bytes]:
        found = (path for path in (root / package).rglob("*") if path.is_file())
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in found
            if "__pycache__" not in path.parts
        }

    kept = files(ROOT)
    assert {Path(name).suffix for name in kept} >= {".py", ".safetensors"}
    assert files(installed.folder) == kept


def test_nothing_else_is_installed(installed: Installed) -> None:
    (metadata,) = installed.folder.glob("*.dist-info")
    assert {path.name for path in installed.folder.iterdir()} == {*PACKAGES, "bin", metadata.name}
    assert (metadata / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_help_lists_the_commands_and_the_version_is_that_of_the_project(installed: Installed) -> None:
    listed = installed.run("--help")
    assert listed.returncode == 0, listed.stderr
    assert [name for name in COMMANDS if f"\n  {name} " not in listed.stdout] == []
    assert installed.run("--version").stdout == f"ctmsr {PROJECT['version']}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_itself_before_it_imports_what_is_slow(installed: Installed, command: str) -> None:
    done = installed.run(command, "--help", under=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: ctmsr {command} ")
    assert "python -m pipelines" not in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pipelines.infra.exit_status" in imported
    assert imported & SLOW_TO_IMPORT == set()


def test_upscale_in_an_empty_folder(installed: Installed, photos: dict[str, bytes]) -> None:
    missing = installed.run("upscale", "photo.jpg", "--output", "up")
    assert (missing.returncode, missing.stderr) == (2, "error: photo.jpg does not exist. Check the path.\n")
    name, content = next(iter(photos.items()))
    (installed.empty / name).write_bytes(content)
    done = installed.run("upscale", name, "--output", "up")
    assert done.returncode == 0, done.stderr
    assert len(list((installed.empty / "up").glob("*_x4.png"))) == 1


def test_requirements_txt_is_a_copy_of_the_dependencies() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == PROJECT["dependencies"]


def test_no_extra_asks_for_another_release_of_a_dependency() -> None:
    base = {Requirement(line).name for line in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    assert base & {Requirement(line).name for lines in extras.values() for line in lines} == set()
