"""First lines of docstrings, read from source files: importing them would load torch or Ray for seconds."""

import ast
from pathlib import Path


def of_module(path: Path) -> str:
    """The first line of a module's docstring."""
    return _first_line(_parsed(path))


def of_functions(path: Path) -> dict[str, str]:
    """The first line of the docstring of each public function of a module, in source order."""
    return {
        node.name: _first_line(node)
        for node in _parsed(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]
