"""Error of the network against the authors' own outputs, by arithmetic: `python -m tests.benchmarks.parity`.

Needs only torch. The expected outputs are those in tests/fixtures/forward_fixture.npz. An error is the
largest difference relative to the largest output; the tests on CPUs allow 1e-4 in float32.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctmsr.model.network import ConsistencyModel, bf16_copy
from tests.support.fixture_inputs import FULL, TINY, fill_weights, tensor
from tests.support.repository import FIXTURES

from .machine import machine

CASES = {
    "sigma1.0000": ("lq", "eps", 64, 1.0),
    "sigma0.3333": ("lq", "eps", 64, 1 / 3),
    "64x128": ("lq2", "eps2", 128, 1.0),
}
"""Names of LQ and noise, LQ width, and sigma by case."""
SIZES = {"tiny": TINY, "full": FULL}
PRECISIONS = {"float32": "highest", "TF32": "high", "bf16": "high"}
"""torch's precision of float32 products, by arithmetic."""


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, sigma and LQ of a case."""
    lq_name, noise_name, width, sigma = CASES[case]
    lq = tensor(lq_name, (1, 3, 64, width)).clamp(-1, 1) / 2
    lq_up = F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False)
    return lq_up + sigma * tensor(noise_name, tuple(lq_up.shape)), torch.tensor([sigma]), lq


@torch.inference_mode()
def errors(size: str, arithmetic: str, device: torch.device) -> dict[str, float]:
    """Relative error by case."""
    torch.set_float32_matmul_precision(PRECISIONS[arithmetic])
    torch.backends.cudnn.allow_tf32 = arithmetic != "float32"
    model = ConsistencyModel(SIZES[size]).eval()
    fill_weights(model)
    network = (bf16_copy(model) if arithmetic == "bf16" else model).to(device)
    expected = np.load(FIXTURES / "forward_fixture.npz")
    found = {}
    for case in CASES:
        out = network(*(value.to(device) for value in inputs(case)))[0, :, ::16, ::16].float().cpu().numpy()
        right = expected[f"{size}_{case}"]
        found[case] = float(np.abs(out - right).max() / np.abs(right).max())
    return found


def table(figures: dict[str, Any]) -> list[str]:
    """Lines of the table, from what `--json` writes."""
    lines = [f"{figures['machine']}: largest error, relative to the largest output"]
    for name, found in figures["errors"].items():
        size, arithmetic = name.split(", ")
        shown = "  ".join(f"{case} {value:.1e}" for case, value in found.items())
        lines.append(f"{size:6}{arithmetic:10}{shown}")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"machine": machine(device), "errors": {}}
    print(*table(figures))
    for size in arguments.sizes:
        for arithmetic in PRECISIONS:
            figures["errors"][f"{size}, {arithmetic}"] = errors(size, arithmetic, device)
            print(table(figures)[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
