"""Writes the GPU's tables of RESULTS.md: `python -m tests.benchmarks.results`.

They come from the gpu-*.json files in `results`, which tests/benchmarks/gpu.sh writes. Lines that these files
do not hold, such as peak memory, stay as they are.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipelines.config.presets import PRESETS

from . import inference, parity, train_step
from .machine import card_of

FOLDER = Path(__file__).parent / "results"
RESULTS = FOLDER.parent / "RESULTS.md"
HEADING = "## One H100"
INDENT = "    "
AFTER_TABLES = ("peak memory ", "MFU ", "ratio ")
"""How the lines below a table begin."""


def read(name: str) -> dict[str, Any]:
    """The figures of gpu-NAME.json."""
    figures: dict[str, Any] = json.loads((FOLDER / f"gpu-{name}.json").read_text())
    return figures


def tables() -> list[tuple[list[str], float | None]]:
    """The lines of each table, and the ratio printed below it."""
    steps, pictures = read("steps"), read("inference")
    forms = {name: (form["ms"] / 1e3, form["losses"]) for name, form in steps["forms"].items()}
    times = [seconds for seconds, _ in forms.values()]
    card, scale = card_of(pictures["machine"]), PRESETS[pictures["preset"]]().network.scale
    assert card is not None
    made: list[tuple[list[str], float | None]] = [(parity.table(read("parity")), None)]
    for side, rows in pictures["sizes"].items():
        flops = rows["plain"]["mfu"] * card.bf16 * rows["plain"]["ms"] / 1e3
        lines = inference.table(rows, int(side), scale, flops)
        made.append((lines, list(rows.values())[-1]["ratio"]))
    return [*made, (train_step.table(forms, steps["batch"]), times[0] / times[-1])]


def filled(text: str) -> str:
    """RESULTS.md with the tables of the JSON files.

    Raises:
        ValueError: A table's first line is not in it.
    """
    before, heading, section = text.partition(HEADING)
    lines = section.split("\n")
    for table, ratio in tables():
        new = [INDENT + line for line in table]
        if new[0] not in lines:
            raise ValueError(
                f"{RESULTS.name} has no line {new[0]!r} under {HEADING!r}. Put it where the table belongs."
            )
        first = last = lines.index(new[0])
        while lines[last].strip() and not lines[last].startswith(
            tuple(INDENT + begin for begin in AFTER_TABLES)
        ):
            last += 1
        lines[first:last] = new
        below = range(first + len(new), first + len(new) + len(AFTER_TABLES))
        for number in below:
            if ratio and lines[number].startswith(f"{INDENT}ratio "):
                lines[number] = f"{INDENT}ratio {ratio:.2f}"
    return before + heading + "\n".join(lines)


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.results").parse_args()
    RESULTS.write_text(filled(RESULTS.read_text()))


if __name__ == "__main__":
    main()
