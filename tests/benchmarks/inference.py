"""One-step inference, ours against a plain form of it: `python -m tests.benchmarks.inference --help`.

Needs no Ray. A picture goes from uint8 array to uint8 array, as a user's does: noise, tiles and rounding are
part of the time. The forms take turns, and the table holds medians. The plain form is the network in float32
as written down, with the noise drawn on the host.
"""

import argparse
import copy
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ctmsr.metrics.full_reference import psnr_y
from ctmsr.model.device import keep_freed_memory, use_fast_math
from ctmsr.model.graphs import replay_graphs
from ctmsr.model.inference import InferenceConfig, for_inference, upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.config.presets import PRESETS

from .machine import card_of, machine
from .plain import count_flops, plain_network
from .train_step import synchronize, torch_defaults

Upscaler = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Form:
    """One row of the table."""

    name: str
    upscaler: Upscaler


def forms(model: ConsistencyModel, sigma_max: float, device: torch.device) -> list[Form]:
    """What is compared, the plain form first."""
    config = InferenceConfig(noise_version=1)
    plain = partial(upscale, plain_network(model), sigma_max=sigma_max, config=config)
    ours = InferenceConfig(batch_tiles=16)
    bf16 = InferenceConfig(precision="bf16")
    found = [
        Form("plain", lambda lq_u8: torch_defaults(lambda: plain(lq_u8))),
        Form("ours in float32", partial(upscale, model, sigma_max=sigma_max, config=ours)),
    ]
    if device.type == "cuda":
        fast, replayed = (for_inference(copy.deepcopy(model), device, bf16) for _ in range(2))
        for name, network in (("+ bf16, channels_last", fast), ("+ CUDA graph", replay_graphs(replayed))):
            found.append(Form(name, partial(upscale, network, sigma_max=sigma_max, config=ours)))
    else:
        kept = partial(upscale, for_inference(model, device, ours), sigma_max=sigma_max, config=ours)
        found.append(Form("+ freed memory kept", partial(with_freed_memory_kept, kept)))
    return found


def with_freed_memory_kept(upscaler: Upscaler, lq_u8: np.ndarray) -> np.ndarray:
    """Upscales as `for_inference` has it, then goes back to the C library's defaults for the other forms."""
    keep_freed_memory()
    try:
        return upscaler(lq_u8)
    finally:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 65536)  # M_MMAP_MAX
        libc.mallopt(-1, 128 * 1024)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def picture(side: int) -> np.ndarray:
    """A smooth random uint8 picture."""
    coarse = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    pixels: np.ndarray = (255 * smooth[0].permute(1, 2, 0)).byte().numpy()
    return pixels


def measure(found: list[Form], lq_u8: np.ndarray, rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of a picture by form."""
    times: dict[str, list[float]] = {form.name: [] for form in found}
    for number in range(rounds + warm_up):
        for form in found:
            synchronize()
            started = time.perf_counter()
            form.upscaler(lq_u8)
            synchronize()
            if number >= warm_up:
                times[form.name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512], help="LR px")
    parser.add_argument("--rounds", type=int, default=20, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU; default %(default)s")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    use_fast_math()
    preset = PRESETS[arguments.preset]()
    torch.manual_seed(0)
    model = ConsistencyModel(preset.network).to(device).eval()
    found = forms(model, preset.schedule.sigma_max, device)
    print(f"{machine(device)}, preset {arguments.preset}")
    figures = {"machine": machine(device), "preset": arguments.preset, "sizes": {}}
    for side in arguments.sizes:
        rounds = max(2, arguments.rounds * 64 // max(64, side))
        figures["sizes"][side] = report(model, found, side, rounds, device)
        write(figures, arguments.json)


def write(figures: dict, path: Path | None) -> None:
    """After each size, so that what is measured is kept."""
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def report(model: ConsistencyModel, found: list[Form], side: int, rounds: int, device: torch.device) -> dict:
    """Measures and prints one size."""
    lq_u8 = picture(side)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = measure(found, lq_u8, rounds)
    pictures = {form.name: form.upscaler(lq_u8) for form in found}
    size, scale = min(side, 64), model.config.scale
    x, lq = torch.zeros(1, 3, size * scale, size * scale), torch.zeros(1, 3, size, size)
    flops = count_flops(model, x.to(device), torch.ones(1, device=device), lq.to(device)) * (side / size) ** 2
    card = card_of(machine(device))
    rows = {}
    for name, one in seconds.items():
        ratio, mfu = seconds["plain"] / one, flops / one / card.bf16 if card else None
        same = psnr_y(pictures[name], pictures["ours in float32"], crop_border=0) if name[0] == "+" else None
        rows[name] = {"ms": 1e3 * one, "ratio": ratio, "mfu": mfu, "psnr_to_float32": same}
    print("", *table(rows, side, scale, flops), sep="\n")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(f"ratio {list(rows.values())[-1]['ratio']:.2f}", flush=True)
    return rows


def table(rows: dict[str, dict[str, float | None]], side: int, scale: int, flops: float) -> list[str]:
    """Lines of one size's table.

    Args:
        rows: As `--json` writes them for this size.
        side: Of the LR picture, in pixels.
        scale: HR/LR ratio.
        flops: Of one picture.
    """
    lines = [
        f"{side} -> {scale * side}, {flops / 1e12:.2f} TFLOP",
        f"{'':28}{'ms':>9}{'pictures/s':>12}{'ratio':>7}{'MFU':>7}{'PSNR to float32, dB':>21}",
    ]
    for name, row in rows.items():
        ms, mfu, psnr = row["ms"] or 0, row["mfu"], row["psnr_to_float32"]
        lines.append(
            f"{name:28}{ms:>9.2f}{1e3 / ms:>12.1f}{row['ratio']:>7.2f}"
            f"{f'{mfu:.1%}' if mfu else '':>7}{f'{psnr:.1f}' if psnr else '':>21}".rstrip()
        )
    return lines


if __name__ == "__main__":
    main()
