"""The fault drill: training through many faults must end as if there were none: `python -m tests.drill`

Starts an S3 server behind a proxy, MLflow, a Ray head and two nodes on this machine, and trains twice: first
undisturbed, then through faults of every kind, at steps and for times determined by the seed. In the end both
runs must have the same weights, bit for bit, and the same losses, and every checkpoint must be readable.
Needs root, for a small disk that can be filled.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from mlflow import MlflowClient

from pipelines.infra.checkpoints import find
from tests.drill.run import KINDS, RECOVERY_S, DrillError, Fault, FaultedRun
from tests.drill.verify import lost_steps, other_state, unreadable
from tests.drill.world import BUCKET, World, world
from tests.support.training_command import BATCH, logged

STEPS_PER_FAULT = 30
LENGTH_S = (3.0, 8.0)


def plan(num_faults: int, seed: int) -> list[Fault]:
    """Faults of every kind in random order, one in every STEPS_PER_FAULT steps."""
    draw = random.Random(seed)
    kinds = [*KINDS, *draw.choices(KINDS, k=num_faults - len(KINDS))]
    draw.shuffle(kinds)
    return [
        Fault(
            number,
            kind,
            step=(number - 1) * STEPS_PER_FAULT + draw.randint(STEPS_PER_FAULT // 4, STEPS_PER_FAULT),
            delay_s=draw.uniform(0, 1),
            length_s=draw.uniform(*LENGTH_S),
        )
        for number, kind in enumerate(kinds, 1)
    ]


def undisturbed(there: World, total_steps: int) -> None:
    """Trains the reference run."""
    with there.train("reference", total_steps) as command:
        command.wait_until(command.status, "end", timeout_s=RECOVERY_S + 2 * total_steps)
        if command.status() != 0:
            raise DrillError(
                f"without a fault the command ended with {command.status()}. {command.log_tail()}"
            )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.drill", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--faults", type=int, default=20, help=f"number of faults; at least {len(KINDS)}, one of each kind"
    )
    parser.add_argument("--seed", type=int, default=0, help="determines kinds, steps and times")
    parser.add_argument(
        "--folder", type=Path, help="a new folder to keep the logs in; by default they are deleted"
    )
    arguments = parser.parse_args()
    if arguments.faults < len(KINDS):
        parser.error(f"--faults must be at least {len(KINDS)}, one of each kind, got {arguments.faults}")
    if os.geteuid() != 0:
        parser.error("only root can mount the small disk to be filled")
    signal.signal(signal.SIGTERM, _stop)
    with ExitStack() as stack:
        if arguments.folder:
            arguments.folder.mkdir(parents=True)
        scratch = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="drill"))
        there = stack.enter_context(world(Path(scratch).absolute()))
        return drill(there, plan(arguments.faults, arguments.seed), arguments.seed)


def drill(there: World, faults: list[Fault], seed: int) -> int:
    """Runs both trainings and reports; returns the exit status."""
    total_steps = (len(faults) + 1) * STEPS_PER_FAULT
    started = time.monotonic()
    undisturbed(there, total_steps)
    print(f"reference: {total_steps} steps in {time.monotonic() - started:.0f} s", flush=True)
    run = FaultedRun(there, total_steps, seed)
    try:
        for fault in faults:
            print(run.strike(fault), flush=True)
        run.finish()
    except RuntimeError as error:
        print(f"{len(run.recovered_s)} of {len(faults)} faults were survived, then: {error}", file=sys.stderr)
        return 1
    finally:
        run.command.kill()
    return report(there, run, len(faults), total_steps)


def report(there: World, run: FaultedRun, num_faults: int, total_steps: int) -> int:
    """Compares the two runs, and prints the result."""
    client = MlflowClient(there.mlflow.url)
    steps = lost_steps(logged(client, "reference"), logged(client, "faulted"), total_steps)
    broken = run.unreadable + unreadable(run.run_uri)
    state = other_state(find(f"{BUCKET}/runs/reference"), find(run.run_uri))
    for problem in (*state, *broken, *steps[:10]):
        print(problem, file=sys.stderr)
    print(
        f"{len(run.recovered_s)} of {num_faults} faults survived, {BATCH * len(steps)} samples lost, "
        f"{len(broken)} unreadable checkpoints; median time to recover "
        f"{statistics.median(run.recovered_s):.1f} s"
    )
    return 1 if state or broken or steps else 0


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
