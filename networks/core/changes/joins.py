"""How a change meets the base weight.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from library.errors import UserError

EPS = 1.1920929e-07  # of float32: what readers of dora_scale add to the norm
CANCELLED = 1e-3  # of |W0|^2: below it the expansion of the norm has lost digits, and the column is summed directly
MAX_DIRECT_COLUMNS = 64
LOST = 1e-7  # of |W0|^2: what lies below it is noise of the expansion
TINY = 1e-30  # squared norm of an empty column, whose root has a gradient
PER_OUTPUT = (
    "one magnitude for each output (PEFT, LyCORIS with wd_on_output=True). Here there is one for each input, "
    "(1, inputs), which is what inference programs apply exactly; the one cannot be turned into the other. It can be "
    "merged, with --base_weights or tools/merge_lora.py, but not trained further"
)
CHUNK_VALUES = 2**22  # values of the base weight that are copied at once
HOST = torch.device("cpu")


def are_per_output(magnitudes: Tensor) -> bool:
    """Whether magnitudes are of rows, (O, 1) or (O, 1, 1, 1), and not of the columns that are trained here."""
    return magnitudes.numel() != 1 and magnitudes.shape[0] != 1


class Join(Protocol):
    """The rule that makes one weight out of the base weight and its change."""

    def magnitudes(self) -> Tensor | None:
        """What this rule trains beside the change, as it starts; None where there is nothing."""
        ...

    def columns(
        self, weight: Tensor, magnitudes: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        """The factor of every input column of W0 + strength * up @ down, at least in float32; with magnitudes only."""
        ...

    def merge(self, base: Tensor, change: Tensor, strength: float, magnitudes: Tensor | None) -> Tensor:
        """The weight that computes what the base and `strength` times the change compute together."""
        ...


class Add:
    """W = W0 + dW."""

    def magnitudes(self) -> Tensor | None:
        return None

    def columns(
        self, weight: Tensor, magnitudes: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        raise AssertionError("a sum has no magnitudes")

    def merge(self, base: Tensor, change: Tensor, strength: float, magnitudes: Tensor | None) -> Tensor:
        return base + strength * change


class Decompose:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): W = m (W0 + dW) / |W0 + dW|, m and the norm one number per column.

    A column is everything that meets one input channel: the norm runs over outputs and kernel positions. m starts as
    the norm of W0, which is kept from then on. At strength s the weight is W0 + s (W - W0).

    The norm costs no matrix of the size of W0: with dW = s B A,
    |W0 + dW|^2 = |W0|^2 + 2 s <B'W0, A> + s^2 <(B'B) A, A>, column by column.
    """

    def __init__(self, weight: Tensor | None, has_constant_norm: bool = False) -> None:
        """`weight` (O, I) or (O, I, h, w) is W0; `has_constant_norm` leaves the norm out of the backward pass.

        Without W0, as tools have it, this merges and nothing else.
        """
        self.has_constant_norm = has_constant_norm
        if weight is not None:
            self._squares_I = squared_columns(weight)
            self._shape = (1, -1, *(1,) * (weight.dim() - 2))

    def magnitudes(self) -> Tensor:
        return (self._squares_I.clamp_min(TINY).sqrt() + EPS).view(self._shape)

    def columns(
        self, weight: Tensor, magnitudes: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        if are_per_output(magnitudes):
            raise UserError(f"dora_scale has the shape {list(magnitudes.shape)}: {PER_OUTPUT}")
        dtype = torch.promote_types(up_OR.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            up_OR, down_RN = up_OR.to(dtype), down_RN.to(dtype)
            strength = strength.to(dtype) if isinstance(strength, Tensor) else strength
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_constant_norm):
                norms_I = self._squared_norms(weight, up_OR, down_RN, strength).clamp_min(TINY).sqrt()
            columns: Tensor = magnitudes.to(dtype) / (norms_I + EPS).view(self._shape)
        return columns

    def merge(self, base: Tensor, change: Tensor, strength: float, magnitudes: Tensor | None) -> Tensor:
        """Magnitudes of other programs can be per output, (O, 1, ...) or (O,): the norm then runs over inputs."""
        assert magnitudes is not None
        magnitudes = magnitudes.to(base)
        axis = 1 if magnitudes.dim() > 1 and magnitudes.shape[:2] == (1, base.shape[1]) else 0
        whole = base + change
        norms = torch.linalg.vector_norm(whole, dim=[d for d in range(whole.dim()) if d != axis], keepdim=True)
        merged: Tensor = whole * (magnitudes.reshape(norms.shape) / (norms + EPS))
        return merged if strength == 1 else base + strength * (merged - base)

    def _squared_norms(self, weight: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float) -> Tensor:
        """|W0 + strength * up @ down|^2 of every column."""
        if self._squares_I.device != weight.device or self._squares_I.dtype != up_OR.dtype:
            self._squares_I = self._squares_I.to(weight.device, up_OR.dtype)
        squares_I, num_columns = self._squares_I, weight.shape[1]
        crossed_RN = _Project.apply(up_OR, weight)  # type: ignore[no-untyped-call]
        cross_N = (crossed_RN * down_RN).sum(0)
        product_N = ((up_OR.t() @ up_OR @ down_RN) * down_RN).sum(0)
        changes_I = (2 * strength * cross_N + strength**2 * product_N).view(num_columns, -1).sum(1)
        norms_I = torch.maximum(squares_I + changes_I, LOST * squares_I)
        return self._direct_where_cancelled(norms_I, weight, up_OR, down_RN, strength)

    def _direct_where_cancelled(
        self, norms_I: Tensor, weight: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        """The same with the columns that the change cancels almost wholly, up to a number of them, summed directly.

        That number is fixed, so that a graphics card never waits for the answer how many there are.
        """
        shares_I = norms_I.detach() / self._squares_I.clamp_min(TINY)
        on_host = weight.device == HOST and not torch.compiler.is_compiling()
        if on_host and bool((shares_I >= CANCELLED).all()):
            return norms_I
        shares, places = torch.topk(shares_I, min(MAX_DIRECT_COLUMNS, len(shares_I)), largest=False)
        base = weight[:, places].to(up_OR.dtype).flatten(1)
        down_chosen = down_RN.view(len(down_RN), weight.shape[1], -1)[:, places].flatten(1)
        whole = base + strength * (up_OR @ down_chosen)
        direct = whole.square().sum(0).view(len(places), -1).sum(1)
        return norms_I.index_put((places,), torch.where(shares < CANCELLED, direct, norms_I[places]))


class _Project(torch.autograd.Function):
    """up' @ W0 for a frozen W0 of any dtype and memory format, in the dtype of `up` and without a copy of W0."""

    @staticmethod
    def forward(ctx: Any, up_OR: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        projected_RN = up_OR.new_zeros(up_OR.shape[1], weight[0].numel())
        for rows, part_ON in _row_parts(weight, up_OR.dtype):
            projected_RN.addmm_(up_OR[rows].t(), part_ON)
        return projected_RN

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad_RN.device.type, enabled=False):
            return torch.cat([part_ON @ grad_RN.t() for _, part_ON in _row_parts(weight, grad_RN.dtype)]), None


class _ScaleColumns(torch.autograd.Function):
    """x times a number per column, computed in float32 and rounded once to the dtype of x.

    The number itself would lose more: bf16 has nothing between 1 and 1.0078. A 16-bit x still shows little of a factor
    very near 1; an x in float32, as normalisation layers give it under autocast, shows all of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(x, columns)
        return torch.mul(x, columns, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, columns = ctx.saved_tensors
        grad_x = torch.mul(grad, columns, out=torch.empty_like(grad)) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        axes = [axis for axis in range(x.dim()) if columns.shape[axis] == 1]
        return grad_x, (grad * x).sum(axes, keepdim=True, dtype=columns.dtype).view_as(columns)


def scale_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x with input channel i multiplied by `columns` (1, I) on the last axis, or (1, I, 1, 1) on axis 1 of 4."""
    per_axis = columns if columns.dim() == x.dim() else columns.view(*(1,) * (x.dim() - 1), -1)
    scaled: Tensor = _ScaleColumns.apply(x, per_axis)  # type: ignore[no-untyped-call]
    return scaled


def squared_columns(weight: Tensor) -> Tensor:
    """The squared norm of every column of (O, I) or (O, I, h, w), at least in float32."""
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        sums_N = [part_ON.square().sum(0) for _, part_ON in _row_parts(weight, dtype)]
        return torch.stack(sums_N).sum(0).view(weight.shape[1], -1).sum(1)


def squared_rows(weight: Tensor) -> Tensor:
    """The squared norm of every output of (O, I) or (O, I, h, w), at least in float32."""
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.cat([part_ON.square().sum(1) for _, part_ON in _row_parts(weight, dtype)])


def _row_parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight as matrices in `dtype`: all at once where that is a view, else a copy of a few at a time."""
    is_view = weight.dtype == dtype and weight.is_contiguous()
    step = len(weight) if is_view else max(1, CHUNK_VALUES // weight[0].numel())
    for first in range(0, len(weight), step):
        yield slice(first, first + step), weight[first : first + step].to(dtype).flatten(1)
