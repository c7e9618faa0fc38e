"""Expressions that a GPU computes as one kernel in each direction, where torch alone launches up to twelve.

Triton compiles the kernels on CUDA. Elsewhere, and in compiled blocks, the expressions run as they are.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from library.base.errors import error_in
from library.memory.compiled_calls import CompiledCalls

logger = logging.getLogger(__name__)

COMPILERS = ("torch._dynamo", "torch._inductor", "triton")  # modules of their exceptions

Kernel = tuple[Sequence[Tensor | None], Sequence[Tensor]]
"""The tensors that a kernel reads and writes."""


class ProductCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that counts products, of which fused operations have none."""


@runtime_checkable
class KernelCounter(Protocol):
    """A mode that counts what a GPU does."""

    def pause(self) -> AbstractContextManager[None]:
        """Count nothing inside the block, whose operations a GPU runs as one kernel."""

    def add_kernel(self, read: Sequence[Tensor | None], written: Sequence[Tensor]) -> None:
        """Count a kernel by the tensors that it reads and writes."""


@dataclass(frozen=True)
class BackwardPlan:
    """Which inputs a backward pass keeps and which gradients it computes."""

    left_out: frozenset[int]  # inputs that are not kept: only their shape matters, which is the output's
    terms: Sequence[int]  # of a sum, whose gradient is the output's
    wanted: tuple[int, ...]  # other inputs with a gradient


class Fused:
    """An expression that reads each input once and writes its output once, in the dtype of the first input.

    Intermediate values are at least float32. The backward pass keeps inputs only and computes the rest again.
    """

    is_off: ClassVar[bool] = False  # --no_fused_operations
    is_counted: ClassVar[bool] = False  # operations are counted as a GPU runs them
    num_operations: ClassVar[int] = 0  # of the models that were imported

    def __init__(
        self, expression: Callable[..., Tensor], reads: Mapping[int, Sequence[int]], widens: bool = True
    ) -> None:
        """`reads` are, by number of an input, the inputs whose values its gradient depends on.

        Without `widens` the compiler alone chooses the dtype of intermediate values.
        """
        self.expression, self.reads, self.widens = expression, reads, widens
        self.compiled: dict[str, CompiledCalls] = {}
        self.plans: dict[tuple[tuple[bool, ...], tuple[bool, ...]], BackwardPlan] = {}
        Fused.num_operations += 1

    def __call__(self, x: Tensor, *others: Tensor | None) -> Tensor:
        if not fuses(x):
            return self.expression(x, *others)
        out: Tensor = FusedFunction.apply(self, x, *others)  # type: ignore[no-untyped-call]
        return out

    def run(self, direction: str, *arguments: Any) -> Any:
        """Call `value` or `gradients`: counted as kernels, compiled, or as they are."""
        if not torch._C._len_torch_dispatch_stack():
            return self.run_compiled(direction, arguments)
        plain, modes = getattr(self, direction), _get_current_dispatch_mode_stack()
        counters = [mode for mode in modes if isinstance(mode, KernelCounter)]
        if counters and self.is_counted:
            with counters[-1].pause():
                out = plain(*arguments)
            for read, written in getattr(self, f"{direction}_kernels")(out, *arguments):
                counters[-1].add_kernel(read, written)
            return out
        # torch never compiles a function again that it once met under a mode. There are no products here to count.
        if not all(isinstance(mode, ProductCounter) for mode in modes):
            return plain(*arguments)
        with _disable_current_modes():
            return self.run_compiled(direction, arguments)

    def run_compiled(self, direction: str, arguments: Sequence[Any]) -> Any:
        try:
            return self.calls_of(direction)(*arguments)
        except Exception as error:
            explain_failed_compiler(error)
            raise

    def calls_of(self, direction: str) -> CompiledCalls:
        calls = self.compiled.get(direction)
        if calls is None:
            calls = self.compiled[direction] = CompiledCalls(getattr(self, direction))
        return calls

    def plan_backward(self, needs: tuple[bool, ...], have_shape: tuple[bool, ...]) -> BackwardPlan:
        """Plan the gradients of the inputs that need one; `have_shape` are those with the output's shape."""
        plan = self.plans.get((needs, have_shape))
        if plan is None:
            with_gradient = [i for i, is_needed in enumerate(needs) if is_needed]
            read = {j for i in with_gradient for j in self.reads[i]}
            left_out = frozenset(i for i, has_shape in enumerate(have_shape) if has_shape and i not in read)
            terms = [i for i in with_gradient if i in left_out and not self.reads[i]]
            plan = BackwardPlan(left_out, terms, tuple(i for i in with_gradient if i not in terms))
            self.plans[needs, have_shape] = plan
        return plan

    def value(self, *inputs: Tensor | None) -> Tensor:
        assert inputs[0] is not None
        wide = (widen(x) if self.widens and x is not None else x for x in inputs)
        return self.expression(*wide).to(inputs[0].dtype)

    def value_kernels(self, out: Tensor, *inputs: Tensor | None) -> Iterator[Kernel]:
        yield inputs, [out]

    def gradients(self, wanted: Sequence[int], grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs with the numbers `wanted`."""

        def value(*values: Tensor) -> Tensor:
            given = dict(zip(wanted, values, strict=True))
            return self.value(*(given.get(i, x) for i, x in enumerate(inputs)))

        gradients: tuple[Tensor, ...] = torch.func.vjp(value, *(inputs[i] for i in wanted))[1](grad)
        return gradients

    def gradients_kernels(
        self, out: Sequence[Tensor], wanted: Sequence[int], grad: Tensor, *inputs: Tensor | None
    ) -> Iterator[Kernel]:
        """Yield one kernel for the gradients of all elements, and one for those that are sums over samples or
        tokens."""
        for are_sums in (False, True):
            of_kernel = {
                i: gradient
                for i, gradient in zip(wanted, out, strict=True)
                if (gradient.numel() < grad.numel()) == are_sums
            }
            read = {j for i in of_kernel for j in self.reads[i]}
            if of_kernel:
                yield [grad, *(inputs[i] for i in read)], [*of_kernel.values()]


class FusedFunction(torch.autograd.Function):
    """Autograd's view of a fused operation."""

    @staticmethod
    def forward(ctx: Any, operation: Fused, *inputs: Tensor | None) -> Tensor:
        out: Tensor = operation.run("value", *inputs)
        shape = out.shape
        have_shape = tuple([x is not None and x.shape == shape for x in inputs])
        ctx.operation, ctx.plan = operation, operation.plan_backward(ctx.needs_input_grad[1:], have_shape)
        ctx.save_for_backward(*[None if i in ctx.plan.left_out else x for i, x in enumerate(inputs)])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: BackwardPlan = ctx.plan
        inputs = [grad if i in plan.left_out else x for i, x in enumerate(ctx.saved_tensors)]
        gradients: list[Tensor | None] = [None] * (1 + len(inputs))
        for i in plan.terms:
            gradients[1 + i] = grad
        if plan.wanted:
            for i, gradient in zip(
                plan.wanted, ctx.operation.run("gradients", plan.wanted, grad, *inputs), strict=True
            ):
                gradients[1 + i] = gradient
        return tuple(gradients)


def widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fuses(x: Tensor) -> bool:
    """Return True if a fused operation of `x` runs, or is counted, as one kernel.

    The operation reads a view without a copy, and keeps the tensor of which it is a view.
    """
    if torch.compiler.is_compiling():  # the compiler fuses more
        return False
    return Fused.is_counted or (compiles_for(x.device) and (x.dtype != torch.bfloat16 or compiles_bf16(x.device)))


def decide_fusing(device: torch.device) -> None:
    """Decide whether the operations of the models imported so far are fused on a device. Call before they are built."""
    if Fused.num_operations and compiles_for(device) and not compiles_bf16(device):
        logger.info("this GPU cannot compile operations in bf16: only --mixed_precision fp16 has them fused")


def compiles_for(device: torch.device) -> bool:
    """Return True if operations are fused on a device. The first call decides for the whole process."""
    # How a compiled sum is split depends on the sizes of the first batch, which is another one in a resumed run.
    is_wanted = device.type == "cuda" and not Fused.is_off and not torch.are_deterministic_algorithms_enabled()
    return is_wanted and has_compiler(torch.cuda.current_device() if device.index is None else device.index)


@cache
def compiles_bf16(device: torch.device) -> bool:
    """Return True if Triton compiles bf16 for a GPU; NVIDIA's before Ampere only emulate it."""
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def has_compiler(index: int) -> bool:
    """Compile an operation on a GPU, forward and backward. Return True if that works; logs the answer once."""
    reason = find_compiler_fault(torch.device("cuda", index))
    if reason is None:
        return True
    logger.info("norms, gates and activations take several GPU kernels each, which is slower: %s", reason)
    return False


def find_compiler_fault(device: torch.device) -> str | None:
    """Return why operations cannot be compiled for a GPU, by trying one; None if they can."""
    from torch.utils._triton import has_triton

    return try_compiler(device) if has_triton() else "no working Triton"


def try_compiler(device: torch.device) -> str | None:
    """Compile an operation on a device, forward and backward. Return why that fails, or None if it works."""
    from torch._dynamo.utils import counters

    trial, began = Fused(torch.mul, {0: (1,), 1: (0,)}), time.perf_counter()
    try:
        with _disable_current_modes():  # the planner asks while it counts
            x, y = torch.ones(2, 8, device=device), torch.ones(2, 8, device=device)
            out = trial.calls_of("value")(x, y)
            gradients = trial.calls_of("gradients")((0, 1), out, x, y)
            torch.stack(gradients).sum().item()  # the GPU has run the kernels
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise errors of their own, of the C compiler and of the driver
        return f"the compiler failed ({str(error).strip().partition(chr(10))[0]})"
    source = "from the compiler's cache" if counters["inductor"]["fxgraph_cache_hit"] else "not cached yet"
    seconds = time.perf_counter() - began
    logger.info("norms, gates and activations are compiled (a trial took %.1f s, %s)", seconds, source)
    return None


def explain_failed_compiler(error: Exception) -> None:
    """Raise UserError for an error of a compiler whose trial worked."""
    if type(error).__module__.startswith(COMPILERS):
        reason = str(error).strip().partition("\n")[0]
        raise error_in("--no_fused_operations", cause="needs")(
            f"the compiler of norms, gates and activations failed ({reason}), although its trial at the start worked: "
            "add --no_fused_operations, which is slower and compiles nothing"
        ) from error


@contextmanager
def fused_operations(are_off: bool) -> Iterator[None]:
    """Turn fused operations off inside the block, or leave them to `compiles_for`."""
    before, Fused.is_off = Fused.is_off, are_off
    try:
        yield
    finally:
        Fused.is_off = before


@contextmanager
def count_fused() -> Iterator[None]:
    """Count fused operations inside the block as the kernels that a GPU runs."""
    Fused.is_counted = True
    try:
        yield
    finally:
        Fused.is_counted = False


def owned(x: Tensor) -> Tensor:
    """Return a contiguous `x`, so that autograd does not keep the whole tensor of which it is a view, unless a fused
    operation keeps that anyway."""
    return x if fuses(x) else x.contiguous()
