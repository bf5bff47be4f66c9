"""Objectives at equal cost, with the controls: `python -m tests.benchmarks.ablation --help`.

Every arm trains a network from the same weights on the same pairs in the same order, once per seed; its EMA
weights are scored on held-out photographs. Training towards the HR picture, without CT, is the control: an
arm that does worse has gained nothing from its trajectory. All arms run for one seed before the next, so that
an interrupted comparison is balanced; results are appended to a JSON file, and those in it are not computed
again.

Equal seconds are CPU time on CPUs, which others share, and wall-clock time on GPUs; each arm gets as many
steps as its own cost allows. With equal steps, all arms get the same number. In all arms, the learning rate
is halved at 0.6 of the steps, and the EMA spans a thirtieth of them.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctmsr.config import from_dict, override, to_dict
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.model.device import use_fast_math
from pipelines.config.run_config import RunConfig

from .kit import install
from .local_feed import LocalFeed, PairPool, read_photos
from .local_trainer import LocalTrainer, with_steps
from .machine import machine
from .scores import COLUMNS, Scorer, held_out_pairs
from .starter import CANDIDATES, starter


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    settings: tuple[str, ...] = ()
    """`key=value` on top of the published objective."""
    dtm_share: float = 0.0
    """Fraction of the steps, at the end, with DTM."""


ARMS = {
    "regression": Arm(("loss.hr_target_until=1",)),
    "HR target at x_N only": Arm(("loss.hr_target_until=1", 'loss.steps="last"')),
    "published CT": Arm(),
    "CT + DTM": Arm(dtm_share=0.1),
    "HR half, then CT": Arm(("loss.hr_target_until=0.5",)),
    "... + alignment": Arm(("loss.hr_target_until=0.5", "loss.alignment_weight=1")),
    "... + step an image, rho 2.5": Arm(
        (
            "loss.hr_target_until=0.5",
            "loss.alignment_weight=1",
            "loss.step_per_image=true",
            "schedule.noise_rho=2.5",
            "schedule.res_rho=2.5",
        )
    ),
    "regression, LPIPS of crops": Arm(("loss.hr_target_until=1", "loss.lpips_crop=0.5")),
    "regression, LPIPS-alex": Arm(("loss.hr_target_until=1", 'loss.lpips_net="alex"')),
}
DEFAULT_ARMS = list(ARMS)[:6]


@dataclass(frozen=True)
class Budget:
    """What all arms get the same amount of."""

    unit: str
    amount: float

    @property
    def name(self) -> str:
        """Such as "equal seconds, 6"."""
        return f"equal {self.unit}, {self.amount:g}"


class Results:
    """Rows in a JSON file, for one setting; another setting starts a new file."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {"setting": setting, "rows": []}
        if path.is_file():
            found = json.loads(path.read_text())
            if found["setting"] == setting:
                self.data = found

    def has(self, **keys: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row[k] == v for k, v in keys.items()) for row in self.data["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, also to the file."""
        self.data["rows"].append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        beside.replace(self._path)


class Comparison:
    """The network, the pairs and the held-out photographs that all arms share."""

    def __init__(self, base: RunConfig, trainer: LocalTrainer, pool: PairPool, scorer: Scorer) -> None:
        self._base, self._trainer, self._pool, self._scorer = base, trainer, pool, scorer
        self._step_s: dict[str, float] = {}

    def row(self, name: str, arm: Arm, seed: int, budget: Budget) -> dict[str, Any]:
        """Trains and scores an arm."""
        trainer = self._trainer
        # An arm may have a distance of its own instead of the one that the trainer has compiled.
        config = from_dict(RunConfig, override(to_dict(self._base), [*arm.settings, f"seed={seed}"]))
        usual = trainer.lpips
        if config.loss.lpips_net != self._base.loss.lpips_net:
            trainer.lpips = load_lpips(config.loss.lpips_net).to(trainer.device)
        feed = LocalFeed(
            self._pool, batch_size=config.train.global_batch_size, device=trainer.device, seed=seed
        )
        steps = int(budget.amount)
        if budget.unit == "seconds":
            if name not in self._step_s:
                self._step_s[name] = trainer.seconds_a_step(config, feed, dtm_share=arm.dtm_share, trials=8)
            steps = max(2, int(budget.amount / self._step_s[name]))
        config = with_steps(config, steps, arm.dtm_share)
        started = trainer.clock()
        state = trainer.run(config, feed)
        seconds = trainer.clock() - started
        trainer.lpips = usual
        pictures = self._scorer.pictures(state.ema_model, config.schedule.sigma_max)
        row = {"arm": name, "seed": seed, "budget": budget.name, "steps": steps}
        return row | {"seconds": round(seconds, 2), "scores": self._scorer.scores(pictures)}


def table(data: dict[str, Any]) -> str:
    """A table for each budget: means over seeds and, after +-, the standard deviation over seeds."""
    titles = ("LPIPS-alex", "LPIPS-vgg", "DISTS", "PSNR-Y", "SSIM-Y", "NIQE", "colour")
    digits = (3, 3, 3, 2, 3, 2, 2)
    lines = []
    for budget in dict.fromkeys(row["budget"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["budget"] == budget]
        lines.append(f"{budget:30}{'steps':>7}{'seeds':>6}" + "".join(f"{title:>15}" for title in titles))
        for arm in dict.fromkeys(row["arm"] for row in rows):
            own = [row for row in rows if row["arm"] == arm]
            cells = []
            for name, places in zip(COLUMNS, digits, strict=True):
                values = [row["scores"][name] for row in own]
                spread = f" +-{np.std(values, ddof=1):.{places}f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.{places}f}{spread}".rjust(15))
            steps = round(np.mean([row["steps"] for row in own]))
            lines.append(f"{arm:30}{steps:>7}{len(own):>6}" + "".join(cells))
        lines.append("")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="a folder with train and val")
    parser.add_argument("--kit", type=Path, help="folder of tests.benchmarks.kit, for LPIPS's weights")
    parser.add_argument("--results", type=Path, required=True, help="JSON file; extended if it exists")
    parser.add_argument("--network", default="small", choices=list(CANDIDATES), help="default %(default)s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all arms")
    parser.add_argument("--arms", nargs="*", default=DEFAULT_ARMS, choices=list(ARMS), help="default: six")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=6, help="an arm; 0: none; default %(default)s")
    parser.add_argument("--steps", type=int, default=0, help="an arm; 0: none; default %(default)s")
    parser.add_argument("--pairs", type=int, default=16_384, help="to train on; default %(default)s")
    parser.add_argument("--eval-size", type=int, default=256, help="HR px; default %(default)s")
    parser.add_argument("--draws", type=int, default=2, help="degradations of each; default %(default)s")
    parser.add_argument("--eval-photos", type=int, help="default: all of val and test")
    parser.add_argument("--processes", type=int, help="that degrade; default: all cores but one")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds after which no arm begins")
    arguments = parser.parse_args(words)
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Runs the comparison that the command line describes."""
    if arguments.kit:
        install(arguments.kit)
    published = [*arguments.set, "loss.hr_target_until=0"]
    base = from_dict(RunConfig, override(to_dict(starter(arguments.network)), published))
    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
    num_processes = arguments.processes or max(1, len(os.sched_getaffinity(0)) - 1)
    scale, degradation = base.network.scale, base.degradation
    held_out = [
        photo
        for name in ("val", "test")
        for photo in read_photos(arguments.photos / name, arguments.eval_photos)
    ]
    pairs = held_out_pairs(
        held_out, size=arguments.eval_size, draws=arguments.draws, scale=scale, degradation=degradation
    )
    scorer = Scorer(pairs, device, min(8, num_processes))
    pool = PairPool(
        read_photos(arguments.photos / "train"),
        hr_size=base.network.hr_size,
        scale=scale,
        degradation=degradation,
        capacity=arguments.pairs,
        num_processes=num_processes,
        renew=False,
    )
    setting = {
        "machine": machine(device),
        "network": arguments.network,
        "set": arguments.set,
        "pairs": arguments.pairs,
        "batch": base.train.global_batch_size,
        "held out": f"{len(held_out)} photographs x {arguments.draws}, {arguments.eval_size} px",
    }
    results = Results(arguments.results, setting)
    is_gpu = device.type == "cuda"
    use_fast_math()
    lpips = load_lpips(base.loss.lpips_net, "bf16" if is_gpu else "fp32")
    trainer = LocalTrainer(base.network, lpips, device, bf16=is_gpu, compiled=is_gpu, by_cpu_time=not is_gpu)
    pool.wait()
    pool.close()
    scorer.warm_up()
    if problem := trainer.warm_up(
        base, LocalFeed(pool, batch_size=base.train.global_batch_size, device=device)
    ):
        print(f"not compiled: {problem}", flush=True)
    compare(Comparison(base, trainer, pool, scorer), results, arguments)
    if not results.has(arm="bicubic"):
        row = {"arm": "bicubic", "seed": 0, "budget": "bicubic", "steps": 0, "seconds": 0}
        results.add(row | {"scores": scorer.scores(scorer.bicubic())})
    scorer.close()
    print(table(results.data))


def compare(comparison: Comparison, results: Results, arguments: argparse.Namespace) -> None:
    """Trains the missing arms, seed by seed, until the time is over."""
    ends = time.monotonic() + arguments.time_limit
    budgets = [Budget("seconds", arguments.seconds), Budget("steps", arguments.steps)]
    for seed in range(arguments.seeds):
        for budget in budgets:
            for name in arguments.arms:
                if not budget.amount or results.has(arm=name, seed=seed, budget=budget.name):
                    continue
                if time.monotonic() >= ends:
                    return
                row = comparison.row(name, ARMS[name], seed, budget)
                results.add(row)
                scores = ", ".join(f"{key} {value:.3f}" for key, value in row["scores"].items())
                print(
                    f"{budget.name}, seed {seed}, {name}: {row['steps']} steps, {row['seconds']} s, {scores}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
