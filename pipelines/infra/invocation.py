"""How a command was started, so that its help and its messages show commands as the user types them."""

import argparse
import sys
from pathlib import Path


def as_typed(text: str) -> str:
    """`text`, with `python -m pipelines.train` written as `ctmsr train` if the process was started so."""
    return text.replace("python -m pipelines.", "ctmsr ") if Path(sys.argv[0]).stem == "ctmsr" else text


def command_parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser for the command `name`, whose help keeps the line breaks of its texts."""
    return argparse.ArgumentParser(
        prog=as_typed(f"python -m pipelines.{name}"),
        description=as_typed(description),
        epilog=as_typed(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
