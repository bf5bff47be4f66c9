"""Every command by its name: `ctmsr train ...` is `python -m pipelines.train ...`."""

import argparse
import difflib
import importlib
import re
from pathlib import Path

from ctmsr.errors import ConfigError

from .config import docstrings
from .infra import exit_status
from .infra.invocation import as_typed
from .infra.package import version

COMMANDS = (
    "index",
    "tune",
    "train",
    "evaluate",
    "register",
    "upscale",
    "serve",
    "export",
    "convert",
    "backbones",
    "demo",
)
"""In order of use."""
_FOLDER = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Runs the named command with the arguments after it.

    Raises:
        ConfigError: There is no such command.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    if arguments.command not in COMMANDS:
        near = difflib.get_close_matches(arguments.command, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(COMMANDS)}."
        raise ConfigError(f"unknown command {arguments.command!r}. {hint}")
    return importlib.import_module(_module(arguments.command)).main(arguments.rest)


def command() -> None:
    """Entry point of `ctmsr`."""
    exit_status.run(main)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {_summary(name)}" for name in COMMANDS)
    each = as_typed("python -m pipelines.COMMAND --help")
    parser = argparse.ArgumentParser(
        prog=as_typed("python -m pipelines.").rstrip(". "),
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="One-step generative super-resolution, trained, tuned and released on a Ray cluster.",
        epilog=f"commands:\n{listed}\n\n{each} has its options and examples",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ctmsr {version()}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _module(name: str) -> str:
    return f"{__package__}.{name}.__main__" if (_FOLDER / name).is_dir() else f"{__package__}.{name}"


def _summary(name: str) -> str:
    """The first line of a command's docstring, without the invocation at its end."""
    folder = _FOLDER / name
    line = docstrings.of_module(folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py"))
    return re.sub(r"[:.]? `\S+ [^`]*`\.$", "", line).rstrip(".")


if __name__ == "__main__":
    command()
