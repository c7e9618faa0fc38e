"""How a change meets the base weight.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w, K inputs or
outputs, whichever have magnitudes.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

EPS = 1.1920929e-07  # of float32: what readers of dora_scale add to the norm of columns
CANCELLED = 1e-3  # of |W0|^2: below it the expansion of the norm has lost digits, and the column is summed directly
MAX_DIRECT = 64  # columns or rows
LOST = 1e-7  # of |W0|^2: what lies below it is noise of the expansion
TINY = 1e-30  # squared norm of an empty column, whose root has a gradient
CHUNK_VALUES = 2**22  # values of the base weight that are copied at once
HOST = torch.device("cpu")


def are_per_output(magnitudes: Tensor) -> bool:
    """Whether magnitudes are of rows, (O,), (O, 1) or (O, 1, 1, 1), and not of columns, (1, I) or (1, I, 1, 1)."""
    return magnitudes.numel() != 1 and magnitudes.shape[0] != 1


class Join(Protocol):
    """The rule that makes one weight out of the base weight and its change."""

    is_per_output: bool  # scales are of outputs, else of inputs

    def magnitudes(self) -> Tensor | None:
        """What this rule trains beside the change, as it starts; None where there is nothing."""
        ...

    def scales(
        self, weight: Tensor, magnitudes: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        """The factor of every column, or row, of W0 + strength * up @ down, in the shape of the magnitudes and at least
        in float32; with magnitudes only."""
        ...

    def merge(self, base: Tensor, change: Tensor, strength: float, magnitudes: Tensor | None) -> Tensor:
        """The weight that computes what the base and `strength` times the change compute together."""
        ...


class Add:
    """W = W0 + dW."""

    is_per_output = False

    def magnitudes(self) -> Tensor | None:
        return None

    def scales(
        self, weight: Tensor, magnitudes: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        raise AssertionError("a sum has no magnitudes")

    def merge(self, base: Tensor, change: Tensor, strength: float, magnitudes: Tensor | None) -> Tensor:
        return base + strength * change


class Decompose:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): W = m (W0 + dW) / |W0 + dW|, m and the norm one number per column, or
    per row with `is_per_output`, as PEFT has it and LyCORIS with wd_on_output.

    A column is everything that meets one input channel: the norm runs over outputs and kernel positions. A row is
    everything that one output sees. m starts as the norm of W0, which is kept from then on. At strength s the weight is
    W0 + s (W - W0).

    The norm costs no matrix of the size of W0: with dW = s B A,
    |W0 + dW|^2 = |W0|^2 + 2 s <B'W0, A> + s^2 <(B'B) A, A>, column by column, and
    |W0 + dW|^2 = |W0|^2 + 2 s <W0 A', B> + s^2 <B (A A'), B>, row by row.
    """

    def __init__(self, weight: Tensor | None, has_constant_norm: bool = False, is_per_output: bool = False) -> None:
        """`weight` (O, I) or (O, I, h, w) is W0; `has_constant_norm` leaves the norm out of the backward pass.

        Without W0, as tools have it, this merges and nothing else.
        """
        self.has_constant_norm, self.is_per_output = has_constant_norm, is_per_output
        if weight is not None:
            kernel = (1,) * (weight.dim() - 2)
            self._squares_K = squared_rows(weight) if is_per_output else squared_columns(weight)
            self._shape = (-1, 1, *kernel) if is_per_output else (1, -1, *kernel)

    def magnitudes(self) -> Tensor:
        return (self._squares_K.clamp_min(TINY).sqrt() + self._eps).view(self._shape)

    def scales(
        self, weight: Tensor, magnitudes: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        dtype = torch.promote_types(up_OR.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            up_OR, down_RN = up_OR.to(dtype), down_RN.to(dtype)
            strength = strength.to(dtype) if isinstance(strength, Tensor) else strength
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_constant_norm):
                norms_K = self._squared_norms(weight, up_OR, down_RN, strength).clamp_min(TINY).sqrt()
            scales: Tensor = magnitudes.to(dtype) / (norms_K + self._eps).view(self._shape)
        return scales

    def merge(self, base: Tensor, change: Tensor, strength: float, magnitudes: Tensor | None) -> Tensor:
        """The shape of the magnitudes tells what they are of: (1, I, ...), else (O, 1, ...) or (O,)."""
        assert magnitudes is not None
        magnitudes = magnitudes.to(base)
        axis = 1 if magnitudes.dim() > 1 and magnitudes.shape[:2] == (1, base.shape[1]) else 0
        whole = base + change
        norms = torch.linalg.vector_norm(whole, dim=[d for d in range(whole.dim()) if d != axis], keepdim=True)
        norms = norms + EPS if axis else norms.clamp_min(TINY**0.5)
        merged: Tensor = whole * (magnitudes.reshape(norms.shape) / norms)
        return merged if strength == 1 else base + strength * (merged - base)

    @property
    def _eps(self) -> float:
        """PEFT divides by the norms of rows as they are."""
        return 0.0 if self.is_per_output else EPS

    def _squared_norms(self, weight: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float) -> Tensor:
        """|W0 + strength * up @ down|^2 of every column or row."""
        if self._squares_K.device != weight.device or self._squares_K.dtype != up_OR.dtype:
            self._squares_K = self._squares_K.to(weight.device, up_OR.dtype)
        if self.is_per_output:
            crossed_OR = _ProjectRows.apply(down_RN, weight)  # type: ignore[no-untyped-call]
            cross_K = (crossed_OR * up_OR).sum(1)
            product_K = ((up_OR @ (down_RN @ down_RN.t())) * up_OR).sum(1)
            changes_K = 2 * strength * cross_K + strength**2 * product_K
        else:
            crossed_RN = _Project.apply(up_OR, weight)  # type: ignore[no-untyped-call]
            cross_N = (crossed_RN * down_RN).sum(0)
            product_N = ((up_OR.t() @ up_OR @ down_RN) * down_RN).sum(0)
            changes_K = (2 * strength * cross_N + strength**2 * product_N).view(weight.shape[1], -1).sum(1)
        norms_K = torch.maximum(self._squares_K + changes_K, LOST * self._squares_K)
        return self._direct_where_cancelled(norms_K, weight, up_OR, down_RN, strength)

    def _direct_where_cancelled(
        self, norms_K: Tensor, weight: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        """The same with the columns or rows that the change cancels almost wholly, up to a number of them, summed
        directly.

        That number is fixed, so that a graphics card never waits for the answer how many there are.
        """
        shares_K = norms_K.detach() / self._squares_K.clamp_min(TINY)
        on_host = weight.device == HOST and not torch.compiler.is_compiling()
        if on_host and bool((shares_K >= CANCELLED).all()):
            return norms_K
        shares, places = torch.topk(shares_K, min(MAX_DIRECT, len(shares_K)), largest=False)
        if self.is_per_output:
            whole = weight[places].to(up_OR.dtype).flatten(1) + strength * (up_OR[places] @ down_RN)
            direct = whole.square().sum(1)
        else:
            base = weight[:, places].to(up_OR.dtype).flatten(1)
            down_chosen = down_RN.view(len(down_RN), weight.shape[1], -1)[:, places].flatten(1)
            whole = base + strength * (up_OR @ down_chosen)
            direct = whole.square().sum(0).view(len(places), -1).sum(1)
        return norms_K.index_put((places,), torch.where(shares < CANCELLED, direct, norms_K[places]))


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


class _ProjectRows(torch.autograd.Function):
    """W0 @ down' for a frozen W0 of any dtype and memory format, in the dtype of `down` and without a copy of W0."""

    @staticmethod
    def forward(ctx: Any, down_RN: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.cat([part_ON @ down_RN.t() for _, part_ON in _row_parts(weight, down_RN.dtype)])

    @staticmethod
    def backward(ctx: Any, grad_OR: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad_OR.device.type, enabled=False):
            grad_RN = grad_OR.new_zeros(grad_OR.shape[1], weight[0].numel())
            for rows, part_ON in _row_parts(weight, grad_OR.dtype):
                grad_RN.addmm_(grad_OR[rows].t(), part_ON)
            return grad_RN, None


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


def scale_outputs(out: Tensor, scales_O: Tensor, layer: nn.Module) -> Tensor:
    """What a layer gave, its bias left out, multiplied by a number for each output."""
    shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (1, -1)
    scaled = scale_columns(out, scales_O.view(shape))
    bias = layer.bias
    if not isinstance(bias, Tensor):
        return scaled
    kept = (bias * (1 - scales_O)).view(shape if len(shape) == 4 else (-1,))
    return scaled + kept.to(scaled.dtype)


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
