"""The GPU kernels of a computation, found without a GPU: on fake tensors, which have shapes but no memory.

One operation of torch counts as one kernel, except where CUDA is known to do otherwise:

- A view is free.
- A convolution adds its bias in a second kernel. Its backward pass has one for each gradient.
- A group norm has two: its statistics, then the result. It reads and writes NCHW, so in a channels-last
  network its inputs are copied to NCHW, and back again by the convolution that follows.
- An operation on a list of tensors has one kernel per some dozens of them.

On CPUs and fake tensors, torch chooses other kernels for attention, dropout and norms of lists than on a GPU;
`Trace` chooses as on a GPU.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["product", "reduction", "pointwise", "layout", "list"]
Arithmetic = Literal["bf16", "tf32", "fp32"]

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
REDUCTIONS = {"sum", "mean", "amax", "any", "linalg_vector_norm", "index_put"} | {
    "_softmax",
    "_safe_softmax",
    "_softmax_backward_data",
}
OVERWRITES = {"copy_", "_foreach_copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_"}
"""These write their first argument without reading it."""
LIST_SIZES = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors per launch by the number of lists: `depth_to_max_tensors` in torch's MultiTensorApply.cuh."""
LIST_BLOCKS, BLOCK_ELEMENTS = 320, 65_536
"""Blocks per launch, and elements per block, in the same file."""


@dataclass(frozen=True)
class View:
    """What of a storage a kernel touches."""

    storage: int
    place: tuple[Any, ...]
    """Offset, sizes and strides."""
    bytes: int


@dataclass
class Kernel:
    """One kernel, or several of one operation."""

    name: str
    part: str
    kind: Kind
    reads: list[View] = field(default_factory=list)
    writes: list[View] = field(default_factory=list)
    flops: int = 0
    """Multiplications and additions of a product; 0 for all others, which wait for memory."""
    arithmetic: Arithmetic = "fp32"
    num_launches: int = 1
    is_cast: bool = False

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(view.bytes for view in (*self.reads, *self.writes))


class Trace(TorchDispatchMode):
    """Records the kernels of whatever runs inside it; enter it inside a FakeTensorMode."""

    def __init__(self, part: Callable[[], str] = lambda: "") -> None:
        """
        Args:
            part: Name of the part of the computation that is running now.
        """
        super().__init__()
        self.kernels: list[Kernel] = []
        self.host_reads: list[str] = []
        """Operations whose result the host reads, for which it waits until the GPU has computed it."""
        self._part = part
        self._storages: dict[int, Any] = {}  # kept alive, or another could get the same number
        self._hosts: set[int] = set()
        self._as_on_a_gpu = patch.multiple(F, dropout=_dropout, scaled_dot_product_attention=_attention)
        self._several = {
            "convolution": self._convolution,
            "convolution_backward": self._convolution_backward,
            "native_group_norm": self._group_norm,
            "native_group_norm_backward": self._group_norm_backward,
        }

    def __enter__(self) -> Self:
        self._as_on_a_gpu.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._as_on_a_gpu.__exit__(*exception)

    def stays_on_the_host(self, tensor: Tensor) -> None:
        """What is computed from this tensor alone launches no kernel."""
        self._hosts.add(self._view(tensor).storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked often enough to matter
            return args[0].fake_device
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        inputs = _tensors((args, kwargs))
        is_of_host = bool(inputs) and {t.untyped_storage()._cdata for t in inputs} <= self._hosts
        if name == "_local_scalar_dense":
            if not is_of_host:
                self.host_reads.append(name)
            return 1.0 if args[0].is_floating_point() else args[0].dtype != torch.bool  # any number will do
        if is_of_host or func.namespace != "aten" or func.is_view or name in FREE:
            return func(*args, **kwargs)
        if several := self._several.get(name):
            return several(func, *args, **kwargs)
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation that is one kernel, or one on lists of tensors."""
        name, packet = func.overloadpacket.__name__, func.overloadpacket
        reads = _tensors((args[1:] if name in OVERWRITES else args, kwargs))
        writes = [
            tensor
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value)
        ] or _tensors(out)
        last = self.kernels[-1] if self.kernels else None
        if packet in flop_registry:
            self._add(
                name, "product", reads, writes, flops=flop_registry[packet](*args, **kwargs, out_val=out)
            )
        elif name.startswith(("_foreach_", "_fused_")):
            num_lists = sum(isinstance(value, (list, tuple)) for value in args)
            self._add(name, "list", reads, writes, num_launches=_launches(args[0], num_lists))
        elif name == "linalg_vector_norm" and last and (last.name, last.part) == (name, self._part()):
            last.reads += map(self._view, reads)  # a GPU computes the norms of a list together
            last.writes += map(self._view, writes)
            last.num_launches = -(-len(last.reads) // LIST_SIZES[1])
        else:
            is_cast = name in ("_to_copy", "copy_") and reads[0].dtype != writes[0].dtype
            kind: Kind = "reduction" if name in REDUCTIONS else "pointwise"
            self._add(name, kind, reads, writes, is_cast=is_cast)

    def _add(
        self, name: str, kind: Kind, reads: Sequence[Tensor], writes: Sequence[Tensor], **others: Any
    ) -> None:
        arithmetic = _arithmetic(name, reads[0]) if kind == "product" else "fp32"
        self.kernels.append(
            Kernel(
                name,
                self._part(),
                kind,
                [self._view(tensor) for tensor in reads],
                [self._view(tensor) for tensor in writes],
                arithmetic=arithmetic,
                **others,
            )
        )

    def _view(self, tensor: Tensor) -> View:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        sizes, strides = tuple(tensor.shape), tensor.stride()
        elements = math.prod(size for size, stride in zip(sizes, strides, strict=True) if stride)
        place = (tensor.storage_offset(), sizes, strides)
        return View(storage._cdata, place, elements * tensor.element_size())

    # Operations that are several kernels

    def _in_layout(self, tensor: Tensor, layout: torch.memory_format) -> Tensor:
        """The tensor in a layout, by a copy if need be."""
        if tensor.is_contiguous(memory_format=layout):
            return tensor
        copied = torch.empty_like(tensor, memory_format=layout)
        self._add("layout", "layout", [tensor], [copied])
        return copied

    def _convolution(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        layout = _layout_of_convolution(x, weight)
        x, weight = self._in_layout(x, layout), self._in_layout(weight, layout)
        out: Tensor = func(x, weight, bias, *rest)
        flops = flop_registry[func.overloadpacket](x, weight, bias, *rest, out_val=out)
        self._add("convolution", "product", [x, weight], [out], flops=flops)
        if bias is not None:
            self._add("bias", "pointwise", [out, bias], [out])
        return out

    def _convolution_backward(self, func: Any, grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
        layout = _layout_of_convolution(x, weight)
        grad, x, weight = (self._in_layout(tensor, layout) for tensor in (grad, x, weight))
        outs = func(grad, x, weight, *rest)
        for index, factor in ((0, weight), (1, x)):
            if outs[index] is not None:
                mask = [index == 0, index == 1, False]
                flops = flop_registry[func.overloadpacket](grad, x, weight, *rest[:-1], mask, out_val=outs)
                self._add("convolution_backward", "product", [grad, factor], [outs[index]], flops=flops)
        if outs[2] is not None:
            self._add("bias_backward", "reduction", [grad], [outs[2]])
        return outs

    def _group_norm(self, func: Any, x: Tensor, *rest: Any) -> Any:
        x = self._in_layout(x, torch.contiguous_format)
        outs = func(x, *rest)
        self._add("group_norm_statistics", "reduction", [x], outs[1:])
        self._add("group_norm", "pointwise", [x, *outs[1:], *_tensors(rest[:2])], [outs[0]])
        return outs

    def _group_norm_backward(self, func: Any, grad: Tensor, x: Tensor, *rest: Any) -> Any:
        grad, x = (self._in_layout(tensor, torch.contiguous_format) for tensor in (grad, x))
        outs = func(grad, x, *rest)
        sums = _tensors(outs[1:])
        self._add("group_norm_sums", "reduction", [grad, x, *rest[:2]], sums)
        if outs[0] is not None:
            self._add("group_norm_backward", "pointwise", [grad, x, *rest[:2], *sums], [outs[0]])
        return outs


def _dropout(input: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """FlashAttention takes no bias; the memory-efficient kernel wants it expanded."""
    bias = attn_mask.expand(*q.shape[:3], k.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad)[0]
    return out


def fused(kernels: Iterable[Kernel], parts: Iterable[str]) -> list[Kernel]:
    """The kernels of the compiled form of some parts, by a simple rule.

    A chain of pointwise operations becomes one kernel, which reads its inputs once and writes only what
    others read: later operations of the forward pass, or the backward pass. A reduction joins the chain
    before it, and what uses its result begins another. Products remain as they are. No layout is changed, as
    a compiled norm works in any.

    Args:
        kernels: Of a `Trace`, in its order.
        parts: Names of the parts to compile.
    """
    parts, groups, needs = set(parts), list[list[Kernel]](), list[set[int]]()
    made_by: dict[
        int, tuple[int, bool]
    ] = {}  # storage -> its latest group, and whether others may still join it
    same: dict[int, int] = {}  # storage of a copy in another layout -> that of the original
    for kernel in kernels:
        is_compiled = kernel.part in parts
        if is_compiled and kernel.kind == "layout":
            original, copied = kernel.reads[0].storage, kernel.writes[0].storage
            same[copied] = same.get(original, original)
            continue
        reads = [replace(view, storage=same.get(view.storage, view.storage)) for view in kernel.reads]
        joins = is_compiled and kernel.kind in ("pointwise", "reduction")
        sources = {made_by[view.storage] for view in reads if view.storage in made_by}
        others = {index for index, _ in sources}
        closed = {index for index, is_open in sources if not is_open}
        index = next(
            (
                index
                for index in sorted(others - closed, reverse=True)
                if joins
                and groups[index][0].part == kernel.part
                and not _reaches(needs, others - {index}, index)
            ),
            len(groups),
        )
        if index == len(groups):
            groups.append([])
            needs.append(set())
        groups[index].append(replace(kernel, reads=reads))
        needs[index] |= others - {index}
        for view in kernel.writes:
            made_by[view.storage] = index, joins and kernel.kind == "pointwise"
    return [*_merged(groups)]


def _reaches(needs: list[set[int]], starts: set[int], goal: int) -> bool:
    """Whether a group that `starts` need, directly or not, is `goal`."""
    seen, left = set(starts), list(starts)
    while left:
        if new := needs[left.pop()] - seen:
            if goal in new:
                return True
            seen |= new
            left += new
    return False


def _merged(groups: list[list[Kernel]]) -> Iterator[Kernel]:
    """Each group as one kernel, without what stays inside it."""
    readers: dict[int, set[int]] = defaultdict(set)
    for index, group in enumerate(groups):
        for view in (view for kernel in group for view in kernel.reads):
            readers[view.storage].add(index)
    for index, group in enumerate(groups):
        if len(group) == 1:
            yield group[0]
            continue
        reads: dict[tuple[Any, ...], View] = {}
        writes: dict[int, View] = {}
        for kernel in group:
            reads |= {(v.storage, v.place): v for v in kernel.reads if v.storage not in writes}
            writes |= {v.storage: v for v in kernel.writes}
        kept = [v for v in writes.values() if readers[v.storage] != {index}]
        name = "+".join(kernel.name for kernel in group)
        yield Kernel(name, group[0].part, group[-1].kind, list(reads.values()), kept)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _launches(tensors: Sequence[Tensor], num_lists: int) -> int:
    num_blocks = sum(-(-tensor.numel() // BLOCK_ELEMENTS) for tensor in tensors)
    return math.ceil(max(len(tensors) / LIST_SIZES[min(num_lists, 5)], num_blocks / LIST_BLOCKS))


def _layout_of_convolution(x: Tensor, weight: Tensor) -> torch.memory_format:
    """cuDNN's: channels last if either is."""
    last = torch.channels_last
    return (
        last if last in (suggest_memory_format(x), suggest_memory_format(weight)) else torch.contiguous_format
    )


def _arithmetic(name: str, factor: Tensor) -> Arithmetic:
    """Of a product's factors, under torch's present settings."""
    if factor.dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    if name.startswith("convolution"):
        return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
