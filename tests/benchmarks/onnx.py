"""The ONNX export in ONNX Runtime against torch, on CPU threads: `python -m tests.benchmarks.onnx --help`.

Both go from the same uint8 picture, of the size of a tile, to an uint8 picture, noise and rounding included.
They take turns, and the table holds medians.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from ctmsr.model.inference import for_inference, upscale
from ctmsr.model.noise import position_noise
from pipelines.export.run import export, fetched_source

from .inference import Form, measure, picture
from .machine import machine


def in_onnx_runtime(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The file as a function of one picture that needs no padding."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    scale = int(session.get_modelmeta().custom_metadata_map["scale"])

    def upscaled(lq_u8: np.ndarray) -> np.ndarray:
        rows, columns = (slice(0, scale * side) for side in lq_u8.shape[:2])
        noise = position_noise(0, rows, columns)[None].numpy()
        lq = np.ascontiguousarray(lq_u8.transpose(2, 0, 1)[None], np.float32) / 255
        (sr,) = session.run(["sr"], {"lq": lq, "noise": noise})
        pixels: np.ndarray = np.rint(sr[0] * 255).astype(np.uint8).transpose(1, 2, 0)
        return pixels

    return upscaled


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="starter", help="as for pipelines.export; default %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 288], help="LR px; default 96 288")
    parser.add_argument("--rounds", type=int, default=12, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{machine(torch.device('cpu'))}, {arguments.threads} threads, onnxruntime {onnxruntime.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder, fetched_source(arguments.model) as source:
        path, _ = export(arguments.model, "onnx", Path(folder, "model.onnx"))
        model = for_inference(source.network, "cpu", source.inference)
        in_torch = partial(upscale, model, sigma_max=source.sigma_max, config=source.inference)
        forms = [
            Form("torch", in_torch),
            Form("ONNX Runtime", in_onnx_runtime(path, arguments.threads)),
        ]
        print(f"{'':12}{'torch, ms':>12}{'ONNX, ms':>12}{'levels apart':>14}")
        for side in arguments.sizes:
            lq_u8 = picture(side)
            seconds = measure(forms, lq_u8, arguments.rounds)
            first, second = (form.upscaler(lq_u8).astype(int) for form in forms)
            torch_s, onnx_s = seconds.values()
            apart = np.abs(first - second).max()
            print(f"{f'{side} px':12}{1e3 * torch_s:>12.1f}{1e3 * onnx_s:>12.1f}{apart:>14}")
    print(f"ratio {torch_s / onnx_s:.2f}")


if __name__ == "__main__":
    main()
