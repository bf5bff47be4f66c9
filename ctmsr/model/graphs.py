"""CUDA graphs for inference: the host launches a whole network call instead of single kernels.

A call of the published network consists of some thousand kernels. Unless the picture is large, a fast GPU
finishes them faster than the host can launch them.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .network import ConsistencyModel

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Shapes = tuple[torch.Size, ...]

_MAX_SHAPES = 8
"""Shapes to record at most; each has its own inputs and output, and all share the memory of activations."""
_RECORDING = threading.Lock()
"""torch allows one recording at a time in a process, of whatever model."""


def replay_graphs(model: ConsistencyModel) -> ConsistencyModel:
    """Makes calls of `model` on a GPU replay a CUDA graph from the second call with the same shapes on.

    The model must stay in eval mode and keep its weights where they are; calls must not need gradients.
    Threads may share it. On a CPU this does nothing.

    Returns:
        The same model.
    """
    if next(model.parameters()).device.type == "cuda":
        model.forward = _Replayed(model.forward)  # type: ignore[method-assign]
    return model


class _Replayed:
    """A call and its recordings, by the shapes of the inputs."""

    def __init__(self, call: Call) -> None:
        self._call, self._lock = call, threading.Lock()
        self._seen: set[Shapes] = set()
        self._recordings: dict[Shapes, _Recording] = {}
        # Recordings share the memory of a pool only if they are made in one stream.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, x: Tensor, sigma: Tensor, lq: Tensor) -> Tensor:
        inputs = x, sigma, lq
        shapes = tuple(tensor.shape for tensor in inputs)
        with self._lock:  # two threads must not write the same inputs
            if shapes not in self._recordings:
                if shapes not in self._seen or len(self._recordings) == _MAX_SHAPES:
                    self._seen.add(shapes)
                    return self._call(*inputs)
                with _RECORDING:
                    recording = _Recording(self._call, inputs, self._pool, self._stream)
                self._recordings[shapes] = recording
            return self._recordings[shapes].replay(inputs)


class _Recording:
    """One call as a graph that reads its inputs from, and writes its output to, fixed memory."""

    def __init__(self, call: Call, inputs: tuple[Tensor, ...], pool: Any, stream: torch.cuda.Stream) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(*self._inputs)  # creates this thread's handles of cuBLAS and cuDNN, which a graph must not
        torch.clear_autocast_cache()  # autocast frees the casts that it made here; the graph makes its own
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            self._output = call(*self._inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._output.clone()  # the next replay, of any shape, overwrites it
