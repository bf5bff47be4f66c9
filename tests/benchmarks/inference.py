"""One-step inference, ours against a plain form of it: `python -m tests.benchmarks.inference --help`.

Needs no Ray. Latency of one picture of the preset's LR size; the two take turns, and the table holds medians.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor

from ctmsr.model.network import ConsistencyModel
from pipelines.config.presets import PRESETS

from .plain import count_flops, plain_network
from .train_step import PEAK_TFLOPS, synchronize


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.inference")
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=30, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU; default %(default)s")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    network = PRESETS[arguments.preset]().network
    torch.manual_seed(0)
    model = ConsistencyModel(network).to(device).eval()
    networks = {"plain": plain_network(model), "fused attention": model}
    if device == "cuda":
        networks["+ channels_last, bf16"] = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        networks["+ channels_last, bf16"].bf16 = True
        networks["+ torch.compile"] = copy.deepcopy(networks["+ channels_last, bf16"])
        networks["+ torch.compile"].model.compile()
    x, lq = (torch.rand(1, 3, side, side, device=device) for side in (network.hr_size, network.lq_size))
    times = measure(networks, (x, torch.tensor(1.0, device=device), lq), arguments.rounds)

    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    flops = count_flops(model, x, torch.tensor(1.0), lq)
    print(
        f"{machine}, torch {torch.__version__}, {network.lq_size} -> {network.hr_size}, "
        f"{flops / 1e9:.1f} GFLOP"
    )
    print(f"{'':28}{'ms':>9}{'ratio':>7}")
    for name, seconds in times.items():
        print(f"{name:28}{1e3 * seconds:>9.2f}{times['plain'] / seconds:>7.2f}")
    last = list(times.values())[-1]
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in machine), None)
    if peak:
        print(
            f"MFU {flops / last / peak / 1e12:.1%}, "
            f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
        )
    print(f"ratio {times['plain'] / last:.2f}")


@torch.inference_mode()
def measure(
    networks: dict[str, ConsistencyModel],
    inputs: tuple[Tensor, Tensor, Tensor],
    rounds: int,
    warm_up: int = 3,
) -> dict[str, float]:
    """Median seconds of a call by network."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(rounds + warm_up):
        for name, network in networks.items():
            synchronize()
            started = time.perf_counter()
            network(*inputs)
            synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
