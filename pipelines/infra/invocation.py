"""How a command was started and what it may print: messages show commands as the user types them."""

import argparse
import sys
from pathlib import Path
from unicodedata import category


def as_typed(text: str) -> str:
    """`text`, with `python -m pipelines.train` written as `ctmsr train` if the process was started so."""
    return text.replace("python -m pipelines.", "ctmsr ") if Path(sys.argv[0]).stem == "ctmsr" else text


def printable(text: str) -> str:
    r"""`text` on one line, with control characters written as `\n`, `\x1b` and so on.

    Names of files may contain them, and could break a line or move the cursor of the terminal.
    """
    escaped = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if category(c) in escaped else c for c in text)


def command_parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser for the command `name`, whose help keeps the line breaks of its texts."""
    return argparse.ArgumentParser(
        prog=as_typed(f"python -m pipelines.{name}"),
        description=as_typed(description),
        epilog=as_typed(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
