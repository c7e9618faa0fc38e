"""Counters of the memory and arithmetic of operations as they run, on real or fake tensors.

Fake tensors (torch's FakeTensorMode) have shapes and dtypes but no values, so a step of a model of any size can be
counted on any machine in seconds.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from library.memory.fused_kernels import ProductCounter

aten = torch.ops.aten


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


def attention_backward_flops(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    shapes = gradient.shape, q.shape, k.shape, v.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def product_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


# torch's own table lacks 8-bit integer products and the CPU's flash attention, which is a fifth of the forward pass of
# FLUX.1 at 1024 px.
MORE_FORMULAS = {
    aten._int_mm: product_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


# Operations that launch no kernel, in addition to those with a view as output.
NO_KERNEL = {
    aten._unsafe_view,
    aten.detach,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.lift_fresh,
    aten.new_empty,
    torch.ops.prim.device,
}

# Six of seven calls of a step that reach FakeTensorMode. Its rules give equal sizes and dtypes for them, but take four
# times as long as the operation itself: counting SDXL takes 14.9 instead of 27.6 CPU seconds without them. (Strides
# along axes of one element are those of the operation.)
DIRECT = {aten._to_copy, aten._unsafe_view, aten.addmm, aten.detach, aten.mm, aten.t, aten.transpose, aten.view}
FILLS = {aten.uniform_, aten.zero_}


def run_operation(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operation, past FakeTensorMode for the fake tensors of DIRECT and FILLS."""
    packet = func._overloadpacket
    if packet in DIRECT or packet in FILLS:
        tensors: list[Any] = [value for value in args if isinstance(value, Tensor)]
        # FakeTensorMode also carries the value of a fake tensor that has one (`constant`); a direct call would lose it.
        are_fake = all(isinstance(tensor, FakeTensor) and tensor.constant is None for tensor in tensors)
        # A fill changes nothing that a fake tensor has.
        if are_fake and packet in FILLS:
            return args[0]
        # The result is a new tensor with the fake device of the input. Copies to another device, and results in given
        # tensors, take the usual way.
        if are_fake and kwargs.keys().isdisjoint(("device", "out")):
            with in_kernel_invocation_manager(tensors[0].fake_mode):
                out = func(*args, **kwargs)
            return FakeTensor(tensors[0].fake_mode, out, tensors[0].fake_device)
    return func(*args, **kwargs)


def launches_kernel(func: Any) -> bool:
    """Return True if a call of `func` launches a GPU kernel."""
    return not func.is_view and func._overloadpacket not in NO_KERNEL


def bytes_touched(*values: Any) -> int:
    """Return the bytes of all tensors among the arguments or outputs of a call."""
    return sum(value.numel() * value.element_size() for value in tree_leaves(values) if isinstance(value, Tensor))


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the floating-point operations of a call with output `out`.

    Only matrix products, convolutions and attention count.
    """
    packet = func._overloadpacket
    count: Any = MORE_FORMULAS.get(packet) or flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


class FlopCounter(ProductCounter):
    """Counter of the floating-point operations of a forward and backward pass. Recomputed operations count once.

    Work without gradients, such as a VAE's, is not counted. Set `in_backward` during the backward pass: operations that
    record gradients during it belong to a recomputed forward pass.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.is_grad_enabled() != self.in_backward:
            self.flops += count_flops(func, args, kwargs, out)
        return out


@dataclass(frozen=True)
class Segment:
    """Part of a step between two cuts."""

    label: tuple[str, int] | None  # (pass, block number); None between blocks
    delta: int  # bytes alive at its end minus those at its start
    rise: int  # peak bytes within it minus those at its start
    flops: int
    moved: int = 0  # bytes that kernels read and write
    launches: int = 0  # of kernels


class OperationCounter(TorchDispatchMode):
    """Counter of floating-point operations, bytes read and written, kernel launches, and bytes of live storages.

    A storage is live from its allocation by an operation until it is freed. `answers` are the values returned when a
    fake tensor is read, by kind of dtype: "bool", "int" and "float". Other tensors return their own values.
    """

    def __init__(self, answers: Mapping[str, Any] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flops = self.moved = self.launches = 0
        self.segments: list[Segment] = []
        self._answers = answers
        self._is_paused = False
        self._sizes: dict[int, int] = {}
        self._live_at_cut = self._flops_at_cut = self._moved_at_cut = self._launches_at_cut = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch.compile never runs here, and being hidden from it makes each call slower

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of the calls: autograd queries a device
            return args[0].device
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and self._answers is not None and isinstance(args[0], FakeTensor):
            return self._answers[arithmetic_kind(args[0].dtype)]
        if func is aten.index.Tensor and self._answers is not None:
            args = args[0], [expanded for index in args[1] for expanded in expand_mask(index)], *args[2:]
        out = run_operation(func, args, kwargs)
        if self._is_paused:
            return out
        self.flops += count_flops(func, args, kwargs, out)
        if launches_kernel(func):
            self.launches += 1
            self.moved += bytes_touched(args, out)
        for tensor in tree_leaves(out):
            # Storages on the meta device report bytes, but have no memory.
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._note(tensor.untyped_storage())
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def add_kernel(self, read: Sequence[Tensor | None], written: Sequence[Tensor]) -> None:
        self.launches += 1
        self.moved += bytes_touched(read, written)
        for tensor in written:
            self._note(tensor.untyped_storage())

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Exclude existing memory from the count, even when a view of it is made."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def cut(self, label: tuple[str, int] | None = None) -> None:
        """End the current segment with this label, and begin the next."""
        segment = Segment(
            label,
            delta=self.live - self._live_at_cut,
            rise=self.peak - self._live_at_cut,
            flops=self.flops - self._flops_at_cut,
            moved=self.moved - self._moved_at_cut,
            launches=self.launches - self._launches_at_cut,
        )
        self.segments.append(segment)
        self._begin_segment()

    def restart(self) -> None:
        """Discard all segments and begin the first one."""
        self.segments.clear()
        self._begin_segment()

    def _begin_segment(self) -> None:
        self._live_at_cut = self.peak = self.live
        self._flops_at_cut, self._moved_at_cut, self._launches_at_cut = self.flops, self.moved, self.launches

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        # torch keeps the Python object of a storage for as long as the storage exists.
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def expand_mask(index: Tensor | None) -> Sequence[Tensor | None]:
    """Replace a mask by the indices that it selects along each axis.

    A fake mask along one axis is replaced by all indices, since the number of selected ones is unknown.
    """
    if index is None or index.dtype != torch.bool:
        return [index]
    if not isinstance(index, FakeTensor):
        return index.nonzero(as_tuple=True)
    return [torch.arange(len(index), device=index.device)] if index.ndim == 1 else [index]


def arithmetic_kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"
