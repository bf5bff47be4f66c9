"""Version and licence of this package, whether in a clone, in a job's copy of one or installed."""

import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

NAME = "ctmsr-ray"
_ROOT = Path(__file__).parents[2]
"""The clone, or site-packages."""


def version() -> str:
    """The version in pyproject.toml: in a clone, the clone's own; "unknown" in a job's copy of one."""
    project = _ROOT / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    installed = _installed()
    return installed.version if installed else "unknown"


def licence() -> str:
    """The text of the licence."""
    installed = _installed()
    text = installed.read_text("licenses/LICENSE") if installed else None
    return text or (_ROOT / "LICENSE").read_text(encoding="utf-8")


def _installed() -> Distribution | None:
    """The distribution that this file belongs to, not one of the same name elsewhere."""
    return next(iter(distributions(name=NAME, path=[str(_ROOT)])), None)
