"""Train a starter for so many seconds, without Ray: `python -m tests.benchmarks.gpu_train --help`.

The time is divided into stages, each a run of its own with a config of its own, which begins where the one
before ended: weights, average and optimizer. By default the learning rate falls from stage to stage. What
comes out is a checkpoint as any other, which `python -m pipelines.train --set init_uri=FOLDER` goes on from;
its meta tells of the stages. It is written every `--save-every` seconds, at the end, and when the process is
told to stop. Without a training state it is small enough to be sent about; `--train-state` adds it.

    FOLDER/checkpoint/     the checkpoint
    FOLDER/training.json   the machine, stages, rates, losses, and scores on held-out photographs
    FOLDER/sheet.jpg       LR | bicubic | ours | HR
"""

import argparse
import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ctmsr.config import from_dict, override, to_dict
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import side_by_side, stack
from ctmsr.model import checkpoint
from ctmsr.model.device import use_fast_math
from ctmsr.training.state import TrainState, build_state, start_from, state_tensors
from ctmsr.training.step import check_finite
from pipelines.config.run_config import RunConfig

from .kit import install
from .local_feed import LocalFeed, PairPool, read_photos
from .local_trainer import LocalTrainer, with_steps
from .machine import machine
from .scores import Scorer, held_out_pairs
from .starter import CANDIDATES, starter

STAGES = ("0.6", "0.25 optim.lr=3e-4", "0.15 optim.lr=8e-5")
"""By default: shares of the time, and what is set besides; each halves its rate once, too."""
SHEET_ROWS = 8


@dataclass(frozen=True)
class Stage:
    """A part of the time."""

    share: float
    """Of the whole time."""
    settings: tuple[str, ...]
    """`key=value`, as `--set` takes them."""

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """From "0.25 optim.lr=3e-4 loss.hr_target_until=0"."""
        share, *settings = text.split()
        return cls(float(share), tuple(settings))


@dataclass
class Keeper:
    """Writes the checkpoint and the record of the training, and knows when to stop."""

    folder: Path
    save_every_s: float
    end: float
    """When to stop, on the monotonic clock."""
    with_state: bool
    config: RunConfig
    record: dict[str, Any] = field(default_factory=dict)
    is_stopped: bool = False
    _saved: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)

    def goes_on(self, state: TrainState, losses: dict[str, Tensor]) -> bool:
        """After every step: tells, saves, and says whether there is time for another."""
        now = time.monotonic()
        if now - self._told >= 10:
            self._told = now
            shown = ", ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            total = self.config.optim.total_steps
            print(f"step {state.global_step} of {total}, {self.end - now:.0f} s left: {shown}", flush=True)
            row = {"step": state.global_step, "lr": state.optimizer.param_groups[0]["lr"]}
            self.record["stages"][-1]["losses"].append(
                row | {name: value.item() for name, value in losses.items()}
            )
        if now - self._saved >= self.save_every_s:
            self.save(state)
        return now < self.end and not self.is_stopped

    def save(self, state: TrainState) -> None:
        """Replaces the checkpoint: there is one at every moment but for that of a rename."""
        check_finite(state)
        new, folder, old = (self.folder / name for name in ("new", "checkpoint", "old"))
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        checkpoint.save(
            new,
            model=state.ema_model.state_dict(),
            config=to_dict(self.config),
            meta=self.meta(state),
            train_state=state_tensors(state) if self.with_state else None,
        )
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        self._saved = time.monotonic()

    def meta(self, state: TrainState) -> dict[str, Any]:
        """As the pipelines' checkpoints have it, and the stages so far."""
        return {
            "step": state.global_step,
            "samples_seen": state.global_step * self.config.train.global_batch_size,
            "metrics": self.record.get("scores", {}),
            "libraries": {"torch": torch.__version__},
            "commit": os.environ.get("CTMSR_COMMIT", ""),
            "stages": [{k: v for k, v in stage.items() if k != "losses"} for stage in self.record["stages"]],
        }


def train(
    base: dict[str, Any],
    stages: Sequence[Stage],
    trainer: LocalTrainer,
    pool: PairPool,
    keeper: Keeper,
    init: Path | None = None,
) -> TrainState:
    """All stages, one after the other.

    Args:
        base: RunConfig as a dict, what stages change.
        stages: One or more.
        trainer: The network on its device.
        pool: Pairs to train on.
        keeper: Keeps what comes out; the stages divide the time until `keeper.end`.
        init: Checkpoint to begin with.
    """
    state = loaded(init, base, trainer) if init else None
    for number, stage in enumerate(stages):
        config = from_dict(RunConfig, override(base, [*stage.settings, f"seed={base['seed'] + number}"]))
        feed = LocalFeed(
            pool, batch_size=config.train.global_batch_size, device=trainer.device, seed=config.seed
        )
        held = None if state is None else apart(state)
        step_s = trainer.seconds_a_step(config, feed)
        # What is left, and so without what the trials took; a little stays for saving.
        left_s = 0.98 * (keeper.end - time.monotonic()) * stage.share / sum(s.share for s in stages[number:])
        steps = max(2, int(left_s / step_s))
        config = with_steps(config, steps)
        keeper.config = config
        print(f"stage {number + 1} of {len(stages)}: {steps} steps, {stage.settings}", flush=True)
        keeper.record["stages"].append({"settings": list(stage.settings), "steps": steps, "losses": []})
        started = time.monotonic()
        state = trainer.run(config, feed, before=held, goes_on=keeper.goes_on)
        keeper.record["stages"][-1] |= {
            "steps_done": state.global_step,
            "images": state.global_step * config.train.global_batch_size,
            "seconds": round(time.monotonic() - started, 1),
            "optim": to_dict(config)["optim"],
        }
        keeper.save(state)
        if keeper.is_stopped or time.monotonic() >= keeper.end:
            break
    assert state is not None
    return state


def loaded(init: Path, base: dict[str, Any], trainer: LocalTrainer) -> TrainState:
    """The state of a checkpoint, as a run that starts from it has it."""
    ema, manifest = checkpoint.load_model(init)
    has_state = checkpoint.TRAIN_STATE_FILE in manifest.files
    state = build_state(trainer.model, from_dict(RunConfig, base).optim)
    start_from(state, ema, checkpoint.load_train_state(init) if has_state else {})
    return state


def apart(state: TrainState) -> TrainState:
    """A state apart from the trainer's network, which trials of the next stage's rate write over."""
    model = copy.deepcopy(state.model)
    result = build_state(model, from_dict(RunConfig, {}).optim)
    start_from(result, state.ema_model, {k: v.clone() for k, v in state_tensors(state).items()})
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="a folder with train, val and test")
    parser.add_argument("--kit", type=Path, help="folder of tests.benchmarks.kit, for LPIPS's weights")
    parser.add_argument("--into", type=Path, required=True, help="folder for what comes out")
    parser.add_argument("--seconds", type=float, default=300, help="of training; default %(default)s")
    parser.add_argument("--network", default="even", choices=list(CANDIDATES), help="default %(default)s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all stages")
    parser.add_argument(
        "--stage", action="append", metavar="'SHARE KEY=VALUE ...'", help=f"in order; default {STAGES}"
    )
    parser.add_argument("--init", type=Path, help="checkpoint to begin with")
    parser.add_argument("--compile", action="store_true", help="takes two minutes first")
    parser.add_argument("--train-state", action="store_true", help="save what resuming needs, too")
    parser.add_argument("--save-every", type=float, default=60, help="seconds; default %(default)s")
    parser.add_argument("--processes", type=int, help="that degrade; default: all cores but one")
    parser.add_argument("--pool", type=int, default=32_768, help="pairs in memory; default %(default)s")
    parser.add_argument(
        "--fill-once", action="store_true", help="make the pool's pairs once, where cores are few"
    )
    parser.add_argument("--eval-size", type=int, default=512, help="HR px; default %(default)s")
    parser.add_argument("--eval-photos", type=int, help="of val and test each; default: all")
    parser.add_argument("--smoke", action="store_true", help="every line in seconds: tiny sizes")
    arguments = parser.parse_args()
    if arguments.smoke:
        for name, value in SMOKE.items():
            setattr(arguments, name, value)
    run(arguments)


SMOKE: dict[str, Any] = {
    "network": "tiny",
    "seconds": 4.0,
    "set": ["train.global_batch_size=4", "train.micro_batch_size=4"],
    "save_every": 1.0,
    "processes": 1,
    "pool": 16,
    "eval_size": 192,
    "eval_photos": 1,
}


def run(arguments: argparse.Namespace) -> None:
    """The whole of it, as the command line says."""
    if arguments.kit:
        install(arguments.kit)
    base = override(to_dict(starter(arguments.network)), arguments.set)
    config = from_dict(RunConfig, base)
    num_processes = arguments.processes or max(1, len(os.sched_getaffinity(0)) - 1)
    held_out = [
        photo
        for name in ("val", "test")
        for photo in read_photos(arguments.photos / name, arguments.eval_photos)
    ]
    pairs = held_out_pairs(
        held_out,
        size=arguments.eval_size,
        draws=1,
        scale=config.network.scale,
        degradation=config.degradation,
    )
    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")  # does not touch a GPU yet
    scorer = Scorer(pairs, device, min(8, num_processes))
    pool = PairPool(
        read_photos(arguments.photos / "train", 8 if arguments.smoke else None),
        hr_size=config.network.hr_size,
        scale=config.network.scale,
        degradation=config.degradation,
        capacity=arguments.pool,
        num_processes=num_processes,
        renew=not arguments.fill_once,
    )
    use_fast_math()
    is_gpu = device.type == "cuda"
    lpips = load_lpips(config.loss.lpips_net, "bf16" if is_gpu else "fp32")
    trainer = LocalTrainer(
        config.network,
        lpips,
        device,
        bf16=config.train.precision == "bf16" and is_gpu,
        compiled=arguments.compile,
    )
    keeper = Keeper(arguments.into, arguments.save_every, 0.0, arguments.train_state, config)
    arguments.into.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: setattr(keeper, "is_stopped", True))
    pool.wait(min(arguments.pool, 8 * config.train.global_batch_size))
    started = time.monotonic()
    feed = LocalFeed(pool, batch_size=config.train.global_batch_size, device=device)
    problem = trainer.warm_up(config, feed)
    print(f"{machine(device)}; ready after {time.monotonic() - started:.0f} s {problem}", flush=True)
    keeper.record |= {"machine": machine(device), "compiled": trainer.is_compiled, "problem": problem}
    keeper.record |= {"network": arguments.network, "stages": []}
    keeper.end = time.monotonic() + arguments.seconds
    stages = [Stage.parse(text) for text in arguments.stage or STAGES]
    made = pool.num_made
    began = time.monotonic()
    state = train(base, stages, trainer, pool, keeper, arguments.init)
    keeper.record["pairs_a_second"] = round((pool.num_made - made) / (time.monotonic() - began))
    pool.close()
    evaluate(state, scorer, keeper)
    scorer.close()


def evaluate(state: TrainState, scorer: Scorer, keeper: Keeper) -> None:
    """Scores the average beside bicubic, and writes record, sheet, and the checkpoint with its scores."""
    scorer.warm_up()
    pictures = scorer.pictures(state.ema_model, keeper.config.schedule.sigma_max)
    keeper.record["scores"] = scorer.scores(pictures)
    keeper.record["scores_bicubic"] = scorer.scores(scorer.bicubic())
    for name, value in keeper.record["scores"].items():
        print(f"{name:14}{value:>10.4f}   bicubic {keeper.record['scores_bicubic'][name]:>10.4f}")
    (keeper.folder / "training.json").write_text(json.dumps(keeper.record, indent=1) + "\n")
    chosen = range(0, len(pictures), max(1, len(pictures) // SHEET_ROWS))
    rows = [side_by_side(scorer.pairs[i].hr_u8, scorer.pairs[i].lq_u8, pictures[i]) for i in chosen]
    Image.fromarray(stack(rows[:SHEET_ROWS])).save(keeper.folder / "sheet.jpg", quality=92)
    keeper.save(state)


if __name__ == "__main__":
    main()
