"""What a GPU needs to be told, and ways to it that do not make the host wait."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

DataclassT = TypeVar("DataclassT", bound=Any)


def use_fast_math() -> None:
    """Lets a GPU round the factors of float32 matrix products to TF32 (10 bits); the sums stay float32.

    For the whole process; call it once, before the first step or picture. torch does so in convolutions
    unasked. Without effect on CPUs and on what is bfloat16 anyway.
    """
    torch.set_float32_matmul_precision("high")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, in the order of the current stream: the host does not wait for it.

    From ordinary memory a copy to a GPU waits until the GPU has done all that was asked of it before.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def prefetch(batches: Iterable[DataclassT], device: torch.device) -> Iterator[DataclassT]:
    """The same batches with their tensors on `device`.

    To a GPU they travel in a stream of their own, while the step before is computed: the host asks for the
    next batch as soon as it has asked for that step. On a CPU nothing is done.

    Args:
        batches: Dataclasses that hold CPU tensors in their fields.
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
            tensor.record_stream(now)  # or its memory would be free for the next batch too early
        yield replace(batch, **tensors)
