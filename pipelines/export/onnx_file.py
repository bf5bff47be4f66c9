"""An ONNX file: pictures and noise of any size in, enlarged pictures out."""

import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from .source import Compute, Source, check_agreement, samples

OPSET = 17
"""Of 2022: what programs with an older ONNX Runtime read, too."""
_DOC = """Super-resolution in one call. `lq`: float RGB pictures in [0, 1], padded by reflection to multiples
of padding_multiple. `noise`: standard normal, scale times as high and wide. `sr`: the result, in [0, 1].
Cut a large picture into overlapping tiles, and the noise of each tile out of one noise for all."""


def write(source: Source, path: Path) -> float:
    """Writes the file and compares it, in ONNX Runtime, with torch; returns the largest difference.

    Raises:
        UserError: They do not agree.
    """
    lq, noise = next(samples(source))
    batch_and_sides = {0: "batch", 2: "height", 3: "width"}
    enlarged = {0: "batch", 2: "scale_height", 3: "scale_width"}
    with warnings.catch_warnings():
        # torch's newer exporter fails on this network. The warnings of this one are about its successor, and
        # about shapes, which the comparison on other shapes checks.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            source.portable(),
            (lq, noise),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["lq", "noise"],
            output_names=["sr"],
            dynamic_axes={"lq": batch_and_sides, "noise": enlarged, "sr": enlarged},
        )
    model = onnx.load(path)
    onnx.checker.check_model(model)
    model.doc_string = _DOC
    onnx.helper.set_model_props(model, source.metadata())
    onnx.save(model, path)
    return check_agreement(source, in_onnx_runtime(path), "the ONNX file")


def in_onnx_runtime(path: Path) -> Compute:
    """The file as a function of pictures and noise, on the CPU."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def compute(lq: Tensor, noise: Tensor) -> Tensor:
        (sr,) = session.run(["sr"], {"lq": lq.numpy(), "noise": noise.numpy()})
        return torch.from_numpy(sr)

    return compute
