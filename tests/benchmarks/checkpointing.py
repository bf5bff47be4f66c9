"""What saving costs the training loop: `python -m tests.benchmarks.checkpointing`.

One worker of the `small` preset makes training steps on one thread. Every other stretch of steps begins with
a save by the writer of `pipelines.infra.checkpoints`, which then writes in the background. The last line is
the extra time of these stretches, relative to the time between two checkpoints.
"""

import argparse
import statistics
import tempfile
import time

import torch

from ctmsr.config import to_dict
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.model.network import ConsistencyModel
from ctmsr.training.state import build_state
from ctmsr.training.step import train_step
from pipelines.config.presets import small
from pipelines.infra.checkpoints import CheckpointWriter

from .train_rate import batches

STEPS = 8
"""Length of a stretch: longer than a checkpoint takes to write."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="stretches of each kind; default %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = small()
    state = build_state(ConsistencyModel(config.network), config.optim)
    lpips, stream = load_lpips("vgg"), batches(config, 0)
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(folder)

        def stretch(is_saved: bool) -> float:
            started = time.perf_counter()
            if is_saved:
                writer.save(state, to_dict(config), {"step": state.global_step})
                waits.append(time.perf_counter() - started)
            for _ in range(STEPS):
                train_step(state, next(stream), config.recipe, lpips)
            seconds = time.perf_counter() - started
            writer.wait()
            return seconds

        stretch(False)
        pairs = [(stretch(True), stretch(False)) for _ in range(arguments.rounds)]
    step_s = statistics.median(without for _, without in pairs) / STEPS
    extra_s = statistics.median(saving - without for saving, without in pairs)
    between = config.train.checkpoint_every_steps
    print(f"step {step_s:.3f} s; save returns after {statistics.median(waits):.3f} s")
    print(f"a save costs {extra_s:.3f} s of {between} steps' {between * step_s:.0f} s")
    print(f"ratio {1 + extra_s / (between * step_s):.4f}")


if __name__ == "__main__":
    main()
