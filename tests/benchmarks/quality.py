"""The quality table, a checkpoint beside its peers: `python -m tests.benchmarks.quality --help`.

Each row has a file with the scores of every picture. Scores in it are not computed again, and rows that were
made earlier or elsewhere appear in the table beside new ones.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctmsr.errors import UserError
from ctmsr.metrics.dists import Dists, load_dists
from ctmsr.metrics.full_reference import colour_error
from ctmsr.metrics.perceptual import Lpips, load_lpips
from ctmsr.metrics.scoring import METRICS, Pair
from pipelines.infra.exit_status import run

from .machine import machine
from .peers import PEERS, SCALE, Bench, Loaded, Made, load_bicubic, load_checkpoint
from .quality_sets import DRAWS, PHOTO_PX, PHOTOS, TESTSETS, Sample, read_set
from .quality_sheet import SHEET, sheet, strip, write_strip

Row = dict[str, dict[str, Any]]
"""Scores by the key of a picture, and under "about" what produced them."""

SCORES = ("psnr_y", "ssim_y", "lpips", "dists", "niqe")
COLUMNS = {
    **{name: (METRICS[name].title, METRICS[name].digits) for name in SCORES},
    "colour": ("colour", 2),
    "cpu_ms": ("ms", 0),
    "peak_mib": ("MiB", 0),
}
CAPTION = f"""\
Means over the pictures of a set. Set5, Set14 and BSD100 whole, by bicubic x4; val and test are held-out
photographs, the middle {PHOTO_PX} px, degraded in {DRAWS} ways each by the recipe for photographs. PSNR and
SSIM on Y and, like NIQE, without {SCALE} px of border; LPIPS-alex and DISTS on RGB; colour: mean error of low
frequencies, in levels of 255. ms: of one CPU core; MiB: peak of a process that does nothing else."""
RESULTS = Path(__file__).with_name("results")


def picture_scores(made: Made, hr_u8: np.ndarray, lpips: Lpips, dists: Dists) -> dict[str, float]:
    """COLUMNS of one picture, rounded to five digits; without NIQE if it is too small for that."""
    pair = Pair(made.sr_u8, hr_u8, lpips, SCALE, dists)
    found = {name: METRICS[name].compute(pair) for name in SCORES}
    found |= {"colour": colour_error(made.sr_u8, hr_u8), "cpu_ms": made.cpu_ms, "peak_mib": made.peak_mib}
    return {name: float(f"{value:.5g}") for name, value in found.items() if value is not None}


def fill(path: Path, bench: Bench, samples: Iterable[Sample]) -> None:
    """Adds the missing scores to a row, and writes it after each picture.

    Raises:
        UserError: The row in the file was produced by something else.
    """
    about = {"parameters": bench.num_parameters, "version": bench.version}
    about |= {"machine": machine(torch.device("cpu"))}
    row: Row = json.loads(path.read_text()) if path.exists() else {"about": about}
    if row["about"]["version"] != bench.version:
        raise UserError(
            f"{path} is of {row['about']['version']}, and this is {bench.version}. Delete the file, or give "
            "the row another --name."
        )
    lpips, dists = load_lpips("alex"), load_dists()
    for sample in samples:
        if sample.key not in row:
            row[sample.key] = picture_scores(bench(sample.lq_u8), sample.hr_u8, lpips, dists)
            write(path, row)
            print(f"{path.stem} {sample.key} {row[sample.key]}", file=sys.stderr, flush=True)


def write(path: Path, row: Row) -> None:
    """Writes a row atomically, a line per picture."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in row.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(f"{{\n{lines}\n}}\n")
    os.replace(path.with_suffix(".part"), path)


def table(rows: Mapping[str, Row]) -> str:
    """Means over every set of which a row has pictures."""
    sets = [name for name in (*TESTSETS, *PHOTOS) if any(_of(row, name) for row in rows.values())]
    header = "".join(f"{title:>11}" for title, _ in COLUMNS.values())
    lines = []
    for name in sets:
        lines.append(f"{name:14}{header}{'M param.':>10}{'pictures':>10}")
        for title, row in rows.items():
            if not (scores := _of(row, name)):
                continue
            cells = "".join(f"{_mean(scores, column, digits):>11}" for column, (_, digits) in COLUMNS.items())
            millions = row["about"]["parameters"] / 1e6
            lines.append(f"{title:14}{cells}{millions:>10.2f}{len(scores):>10}")
        lines.append("")
    lines.append(CAPTION)
    return "\n".join(lines)


def _of(row: Row, name: str) -> list[dict[str, float]]:
    return [scores for key, scores in row.items() if key.startswith(f"{name}/")]


def _mean(scores: list[dict[str, float]], column: str, digits: int) -> str:
    values = [score[column] for score in scores if column in score]
    return f"{np.mean(values):.{digits}f}" if values else "-"


def read_rows(folder: Path) -> dict[str, Row]:
    """All rows in a folder, by name: bicubic first, then the peers, then ours."""
    found = {
        path.stem.removeprefix("quality-"): json.loads(path.read_text())
        for path in sorted(folder.glob("quality-*.json"))
    }
    order = ["bicubic", *PEERS]
    return dict(sorted(found.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order)))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.quality")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--name", help="name of its row; default: the folder's name")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), metavar="NAME", help="all, or some")
    parser.add_argument("--sets", nargs="*", default=[*TESTSETS, *PHOTOS], help="default: all")
    parser.add_argument("--testsets", type=Path, default=Path("testsets"), help="default %(default)s")
    parser.add_argument("--photos", type=Path, default=Path("photos"), help="default %(default)s")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the rows; default: beside this file"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    ways: dict[str, Callable[[], Loaded]] = {"bicubic": load_bicubic}
    if arguments.peers is not None:
        ways |= {name: PEERS[name] for name in arguments.peers or PEERS}
    if arguments.model:
        ways[arguments.name or arguments.model.name] = partial(load_checkpoint, arguments.model)
    samples = [
        sample for name in arguments.sets for sample in read_set(name, arguments.testsets, arguments.photos)
    ]
    shown = [sample for sample in samples if sample.key in SHEET]
    for name, load in ways.items():
        with Bench(load) as bench:
            fill(arguments.out / f"quality-{name}.json", bench, samples)
            if shown:
                write_strip(
                    arguments.out / f"quality-{name}.jpg", strip([(s, bench(s.lq_u8)) for s in shown])
                )
    rows = read_rows(arguments.out)
    print(table(rows))
    if shown:
        print(f"sheet: {sheet(arguments.out, list(rows), shown)}")
    return 0


if __name__ == "__main__":
    run(main)
