"""CT training steps, ours against a plain form of them: `python -m tests.benchmarks.train_step --help`.

Needs no Ray. The variants take turns, a step each, and the table holds medians; every variant begins with the
same weights and gets the same batches, so that after equal steps their losses can be compared. All have the
published objective, whatever the preset's own.
"""

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ctmsr.metrics.perceptual import Lpips, load_lpips
from ctmsr.model.attention import WindowAttention
from ctmsr.model.device import use_fast_math
from ctmsr.model.network import ConsistencyModel, bf16_copy
from ctmsr.training.losses import LossConfig
from ctmsr.training.objective import Batch
from ctmsr.training.state import TrainState, build_state
from ctmsr.training.step import compile_step, train_step
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig

from .kit import install
from .machine import card_of, machine
from .plain import PlainTraining, count_flops
from .replay import replay_network

Step = Callable[[Batch], float | Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Variant:
    """What ours does beyond the plain form, one measure after the other."""

    name: str
    channels_last: bool = False
    bf16_lpips: bool = False
    autocast: bool = False
    """bf16 by autocast, which casts the weights whenever they are used."""
    bf16_copy: bool = False
    """bf16 on a copy of the weights, which is cast once a step."""
    compile: bool = False
    graphs: bool = False
    """Replays the network's calls, see `replay_network`."""


PLAIN: dict[str, dict[str, bool]] = {
    "plain": {},
    "+ no target call at n = 0": {"skip_known_target": True},
    "+ fused attention": {"skip_known_target": True, "fused_attention": True},
}
"""Options of `PlainTraining` by row of the table."""
OURS = Variant("+ fused AdamW and EMA, nothing read")
GPU = (
    Variant("+ channels_last", channels_last=True),
    Variant("+ LPIPS in bf16", channels_last=True, bf16_lpips=True),
    Variant("+ autocast to bf16", channels_last=True, bf16_lpips=True, autocast=True),
    Variant("  or a bf16 copy of the weights", channels_last=True, bf16_lpips=True, bf16_copy=True),
)


def torch_defaults(compute: Callable[[], Result]) -> Result:
    """The result, computed as torch does by default: products of float32 matrices in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return compute()
    finally:
        torch.set_float32_matmul_precision(before)


def our_step(variant: Variant, model: ConsistencyModel, config: RunConfig, size: int) -> Step:
    """A function that makes one update of a copy of `model`, with `size` images."""
    model = copy.deepcopy(model)
    lpips = load_lpips("vgg", "bf16" if variant.bf16_lpips else "fp32").to(next(model.parameters()).device)
    if variant.channels_last:
        for module in (model, lpips):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = our_state(variant, model, config)
    if variant.graphs:
        replay_network(state, size)
    return step_of(variant, state, lpips, config)


def our_state(variant: Variant, model: ConsistencyModel, config: RunConfig) -> TrainState:
    """The state of a run that trains `model`."""
    state = build_state(model, config.optim, bf16_copy(model) if variant.bf16_copy else None)
    if variant.compile:
        compile_step(state)
    return state


def step_of(variant: Variant, state: TrainState, lpips: Lpips, config: RunConfig) -> Step:
    """A function that makes one update of `state`."""

    def step(batch: Batch) -> Tensor:
        with torch.autocast(batch.hr_u8.device.type, torch.bfloat16, enabled=variant.autocast):
            return train_step(state, batch, config.recipe, lpips)["loss"]

    return step


def as_torch_does(step: Step) -> Step:
    """The step under `torch_defaults`."""
    return lambda batch: torch_defaults(lambda: step(batch))


def batches(config: RunConfig, size: int, device: str) -> Iterator[Batch]:
    """Endless batches of smooth random pictures, the same every time."""
    rng = np.random.default_rng(0)
    hr_size, lq_size = config.network.hr_size, config.network.lq_size
    for number in range(10**9):
        coarse = torch.from_numpy(rng.random((size, 3, 16, 16), np.float32))
        pictures = [
            torch.nn.functional.interpolate(coarse, side, mode="bicubic") for side in (hr_size, lq_size)
        ]
        hr_u8, lq_u8 = ((255 * p).clamp(0, 255).byte().permute(0, 2, 3, 1).to(device) for p in pictures)
        samples = list(range(number * size, (number + 1) * size))
        yield Batch(hr_u8=hr_u8, lq_u8=lq_u8, samples=samples, keys=["random"] * size)


def measure(
    steps: dict[str, Step], stream: Iterator[Batch], rounds: int, warm_up: int
) -> dict[str, tuple[float, list[float]]]:
    """Median seconds and all losses by variant."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + warm_up):
        batch = next(stream)
        for name, step in steps.items():
            synchronize()
            started = time.perf_counter()
            loss = step(batch)
            synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - started)
            losses[name].append(float(loss))
    return {name: (statistics.median(times[name]), losses[name]) for name in steps}


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.train_step")
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, help="images a step; default: one worker's part")
    parser.add_argument("--rounds", type=int, default=20, help="default %(default)s")
    parser.add_argument("--warm-up", type=int, default=3, help="default %(default)s")
    parser.add_argument(
        "--threads", type=int, default=1, help="on a CPU; default %(default)s, as a worker has"
    )
    parser.add_argument("--kit", type=Path, help="folder of tests.benchmarks.kit, for LPIPS's weights")
    parser.add_argument(
        "--compiled", action="store_true", help="a compiled form instead of CUDA graphs; takes minutes"
    )
    parser.add_argument("--json", type=Path, help="write figures and losses there, too")
    arguments = parser.parse_args()
    if arguments.kit:
        install(arguments.kit)
    use_fast_math()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    config = replace(PRESETS[arguments.preset](), loss=LossConfig())
    size = arguments.batch or config.train.global_batch_size // config.train.num_workers
    torch.manual_seed(0)
    model = ConsistencyModel(config.network).to(device)
    lpips = load_lpips("vgg").to(device)
    plain = partial(PlainTraining, model, config.recipe, lpips)
    steps: dict[str, Step] = {name: as_torch_does(plain(**options).step) for name, options in PLAIN.items()}
    variants = [OURS, *(GPU if device == "cuda" else ())]
    if arguments.compiled:
        variants.append(replace(variants[-1], name="+ torch.compile", compile=True))
    elif device == "cuda":
        variants.append(replace(variants[-1], name="+ CUDA graphs of the network", graphs=True))
    for variant in variants:
        steps[variant.name] = our_step(variant, model, config, size)
    results = measure(steps, batches(config, size, device), arguments.rounds, arguments.warm_up)
    report(config, model, size, device, results)
    if arguments.json:
        figures = {
            name: {"ms": 1e3 * seconds, "losses": losses} for name, (seconds, losses) in results.items()
        }
        setting = {"machine": machine(torch.device(device)), "preset": arguments.preset, "batch": size}
        arguments.json.write_text(json.dumps(setting | {"forms": figures}, indent=1) + "\n")


def report(
    config: RunConfig,
    model: ConsistencyModel,
    size: int,
    device: str,
    results: dict[str, tuple[float, list[float]]],
) -> None:
    """Prints the table; its last line is the ratio of the last variant."""
    place = machine(torch.device(device)) if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    hr, lq = (
        torch.zeros(1, 3, side, side, device=device)
        for side in (config.network.hr_size, config.network.lq_size)
    )
    forward = count_flops(model.eval(), hr, torch.tensor(1.0), lq)
    num_attention = sum(isinstance(module, WindowAttention) for module in model.modules())
    print(f"{place}, batch {size}, {num_attention} attention layers")
    print(f"{forward / 1e9:.1f} GFLOP a forward pass of one image, LPIPS not counted")
    print(*table(results, size), sep="\n")
    seconds, _ = list(results.values())[-1]
    if card := card_of(place):  # forward, and twice as much backward
        print(f"MFU {3 * forward * size / seconds / card.bf16:.1%}, LPIPS not counted")
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, all variants together")
    else:
        print(
            f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB, all together"
        )
    print(f"ratio {results['plain'][0] / seconds:.2f}")


def table(results: dict[str, tuple[float, list[float]]], size: int) -> list[str]:
    """Lines of the table: median seconds and losses by form, in steps of `size` images."""
    plain_s, plain_losses = results["plain"]
    lines = [f"{'':36}{'ms':>9}{'images/s':>10}{'ratio':>7}{'loss, relative to plain':>25}"]
    for name, (seconds, losses) in results.items():
        drift = np.mean(losses[-10:]) / np.mean(plain_losses[-10:]) - 1
        lines.append(
            f"{name:36}{1e3 * seconds:>9.1f}{size / seconds:>10.2f}{plain_s / seconds:>7.2f}{drift:>+25.2%}"
        )
    return lines


if __name__ == "__main__":
    main()
