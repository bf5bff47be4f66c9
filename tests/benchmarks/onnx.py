"""The ONNX export in two runtimes against torch, on CPU threads: `python -m tests.benchmarks.onnx --help`.

ONNX Runtime, and Intel's OpenVINO where it is installed (`pip install '.[bench]'`), go from the same uint8
picture as torch, of the size of a tile, to an uint8 picture, noise and rounding included. They take turns,
and the table holds medians. The ratio is torch's time to OpenVINO's, or else ONNX Runtime's.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from ctmsr.model.inference import for_inference, upscale
from ctmsr.model.noise import position_noise
from pipelines.export.run import export, fetched_source

from .inference import Form, measure, picture
from .machine import machine

Upscaler = Callable[[np.ndarray], np.ndarray]
Inputs = dict[str, np.ndarray]


def in_onnx_runtime(path: Path, threads: int) -> Upscaler:
    """The file as a function of one picture that needs no padding."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return partial(_upscaled, lambda inputs: session.run(["sr"], inputs)[0], _scale(path))


def in_openvino(path: Path, threads: int) -> Upscaler:
    """The same in OpenVINO, in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    return partial(_upscaled, lambda inputs: model(inputs)["sr"], _scale(path))


def _scale(path: Path) -> int:
    model = onnx.load(path, load_external_data=False)
    return int({entry.key: entry.value for entry in model.metadata_props}["scale"])


def _upscaled(run: Callable[[Inputs], np.ndarray], scale: int, lq_u8: np.ndarray) -> np.ndarray:
    rows, columns = (slice(0, scale * side) for side in lq_u8.shape[:2])
    noise = position_noise(0, rows, columns)[None].numpy()
    lq = np.ascontiguousarray(lq_u8.transpose(2, 0, 1)[None], np.float32) / 255
    pixels: np.ndarray = np.rint(run({"lq": lq, "noise": noise})[0] * 255).astype(np.uint8)
    return pixels.transpose(1, 2, 0)


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
        forms = [Form("torch", in_torch), Form("ONNX Runtime", in_onnx_runtime(path, arguments.threads))]
        if importlib.util.find_spec("openvino"):
            forms.append(Form("OpenVINO", in_openvino(path, arguments.threads)))
        print(f"{'ms':12}" + "".join(f"{form.name:>14}" for form in forms) + f"{'levels apart':>14}")
        for side in arguments.sizes:
            lq_u8 = picture(side)
            seconds = measure(forms, lq_u8, arguments.rounds)
            first, *others = (form.upscaler(lq_u8).astype(int) for form in forms)
            apart = max(np.abs(first - other).max() for other in others)
            columns = "".join(f"{1e3 * each:>14.1f}" for each in seconds.values())
            print(f"{f'{side} px':12}{columns}{apart:>14}")
    of_torch, *of_others = seconds.values()
    print(f"ratio {of_torch / of_others[-1]:.2f}")


if __name__ == "__main__":
    main()
