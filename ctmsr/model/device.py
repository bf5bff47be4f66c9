"""The device to compute on, its settings, and transfers to it that do not make the host wait."""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import check

DataclassT = TypeVar("DataclassT", bound=Any)

DEVICES = ("cuda", "rocm", "mps", "cpu")
"""NVIDIA's GPUs, AMD's, Apple's, and none; in order of preference."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def choose_device(name: str | None = None) -> torch.device:
    """The device to compute on: the one named or, by default, the first of DEVICES that works here.

    torch calls AMD's GPUs "cuda", too; `device_title` tells them apart.

    Args:
        name: One of DEVICES.

    Raises:
        ConfigError: This machine, or this build of torch, has no such device.
    """
    works = {
        "cuda": torch.cuda.is_available() and torch.version.hip is None,
        "rocm": torch.cuda.is_available() and torch.version.hip is not None,
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    found = [one for one in DEVICES if works[one]]
    check(
        name is None or name in found,
        f"there is no device {name!r} here for torch {torch.__version__}, only {', '.join(found)}. "
        "Choose one of these, or install a build of torch for the other.",
    )
    chosen = name or found[0]
    return torch.device("cuda" if chosen == "rocm" else chosen)


def device_title(device: torch.device) -> str:
    """For people, such as "rocm (AMD Instinct MI300X)" or "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{'rocm' if torch.version.hip else 'cuda'} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def use_fast_math() -> None:
    """Lets GPUs round the factors of float32 matrix products to TF32 (10 bits); sums stay float32.

    Applies to the whole process; call it once, before the first step or picture. In convolutions, torch does
    this by default. Has no effect on CPUs or on bfloat16.
    """
    torch.set_float32_matmul_precision("high")


def keep_freed_memory() -> None:
    """Lets the C library reuse freed memory for the next tensors instead of returning it to the kernel.

    A large picture's tensors have tens of MB each; mapping and clearing their pages again for every one takes
    half of the time on a CPU. Applies to the whole process, which then keeps the memory of its peak. Has no
    effect where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to `device` in stream order, without making the host wait.

    A copy from pageable memory would wait until the GPU has finished all earlier work.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def prefetch(batches: Iterable[DataclassT], device: torch.device) -> Iterator[DataclassT]:
    """The same batches with their tensors on `device`.

    To a GPU they are copied in a separate stream while the previous step is computed: the host requests the
    next batch right after it has launched a step. On a CPU this does nothing.

    Args:
        batches: Dataclasses with CPU tensors in their fields.
        device: Where the steps are computed.
    """
    if device.type != "cuda":
        yield from batches
        return
    beside = torch.cuda.Stream(device)
    for batch in batches:
        tensors = {
            field.name: getattr(batch, field.name)
            for field in fields(batch)
            if isinstance(getattr(batch, field.name), Tensor)
        }
        with torch.cuda.stream(beside):
            tensors = {name: upload(tensor, device) for name, tensor in tensors.items()}
        now = torch.cuda.current_stream(device)
        now.wait_stream(beside)
        for tensor in tensors.values():
            tensor.record_stream(now)  # or its memory would be reused too early
        yield replace(batch, **tensors)
