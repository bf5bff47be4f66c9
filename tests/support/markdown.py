"""The documents of this project as tests see them: code blocks and the commands in them.

A block of commands that a laptop cannot run says so in its first line: `# needs a cluster and a bucket`. Of
these, tests check only the syntax; they run all the others.
"""

import re
import shlex
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

from tests.support.repository import ROOT

NEEDS = "# needs "
"""Start of the first line of a block whose commands need more than a laptop."""
SHELL = ("sh", "bash")
_INDENT = " " * 4
_FENCE = re.compile(r" *```(\S*)\s*$")


@dataclass(frozen=True)
class Block:
    """A code block."""

    path: Path
    line: int
    """Number of its first line, from 1."""
    language: str
    text: str

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self) -> str:
        """What its commands need besides a laptop; empty if nothing."""
        first = self.text.partition("\n")[0]
        return first.removeprefix(NEEDS) if first.startswith(NEEDS) else ""

    @property
    def commands(self) -> list[str]:
        """Its commands, one per logical line, without comments."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        found, begun = list[str](), ""
        for line in joined.splitlines():
            begun += re.sub(r"(^|\s+)# .*", "", line).strip()
            if _is_whole(begun):
                found.append(begun)
                begun = ""
        return [*filter(None, found), *filter(None, [begun])]


def _is_whole(text: str) -> bool:
    """Whether all quotes are closed; an open one continues on the next line."""
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


def documents() -> list[Path]:
    """Every document that contains commands."""
    return [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "cluster/README.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]


def blocks(path: Path) -> list[Block]:
    """The code blocks of a document; an indented one counts as shell.

    Raises:
        ValueError: A fence is left open, or names no language.
    """
    found: list[Block] = []
    language: str | None = None
    first, kept = 0, list[str]()
    is_list = is_indented = False
    before = ""
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), "end"], 1):
        fence = _FENCE.match(line)
        if is_indented and line and not line.startswith(_INDENT):
            found.append(Block(path, first, SHELL[0], "\n".join(kept).rstrip()))
            language, is_indented = None, False
        if language is None and fence:
            language, first, kept = fence[1], number + 1, []
            if not language:
                raise ValueError(f"{path}:{number}: the fence names no language, such as sh, python or text.")
        elif language is not None and fence:
            found.append(Block(path, first, language, "\n".join(kept)))
            language = None
        elif language is None and line.startswith(_INDENT) and not before and not is_list:
            language, first, kept, is_indented = SHELL[0], number, [line.removeprefix(_INDENT)], True
        elif language is not None:
            kept.append(line.removeprefix(_INDENT) if is_indented else line)
        if line and not line.startswith(" "):
            is_list = re.match(r"([-*]|\d+\.) ", line) is not None
        before = line.strip()
    if language is not None:
        raise ValueError(f"{path}:{first}: the fence is never closed.")
    return found


def table(path: Path, heading: str) -> list[dict[str, str]]:
    """The rows of the first table below a heading, by column name."""
    _, found, below = path.read_text(encoding="utf-8").partition(f"# {heading}\n")
    assert found, f"{path} has no heading {heading!r}"
    lines = dropwhile(lambda line: not line.startswith("|"), below.splitlines())
    names, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines)
    )
    return [dict(zip(names, row, strict=True)) for row in rows]
