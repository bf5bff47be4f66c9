"""Finds the module that a command of this project runs."""

import importlib
from types import ModuleType


def command_module(name: str) -> ModuleType:
    """The module that `python -m name` runs, which has a `main`.

    Raises:
        ModuleNotFoundError: There is no such module.
    """
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
