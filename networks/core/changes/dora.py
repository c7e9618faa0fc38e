"""DoRA: the changed weight is rescaled to trained magnitudes, one per column or one per row.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w, K columns or
rows, whichever have magnitudes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.options.declared import declare
from networks.core.arguments.values import SWITCH
from networks.core.changes.alpha import SCALAR, ScaledDelta
from networks.core.changes.change import ChangeSize, Delta, Forward, get_weight, weight_shape
from networks.core.changes.dropout import NO_DROPOUT, Dropout
from networks.core.changes.parameter_keys import DORA_SCALE

EPS = 1.1920929e-07  # float32 epsilon, which readers of dora_scale add to column norms
# The expanded norm is a difference of numbers near |W0|^2. Where 1/500 of a column's norm is left, float32 makes its
# scale wrong by more than 1e-3; the direct sum keeps it within 1e-4.
CANCELLED = 1e-3  # share of |W0|^2 below which the expanded norm is too inaccurate and is summed directly
MAX_DIRECT = 64  # columns or rows that are summed directly per call
LOST = 1e-7  # share of |W0|^2 below which the expanded norm is rounding noise
TINY = 1e-30  # squared norm of an empty column, so that its root has a finite gradient
CHUNK_VALUES = 2**22  # values of the base weight that are cast at once
HOST = torch.device("cpu")


def are_per_output(shape: Sequence[int]) -> bool:
    """Return True if magnitudes are per output, (O,), (O, 1) or (O, 1, 1, 1), not per input, (1, I) or (1, I, 1, 1).

    A single magnitude counts as per output: some layers have one output, none has one input.
    """
    return math.prod(shape) == 1 or shape[0] != 1


def can_have_magnitudes(layer: nn.Module) -> bool:
    """Return True if programs read a layer's magnitudes as they are trained, which needs two outputs.

    ComfyUI, Forge and A1111-style loaders take magnitudes for those of outputs if their first axis is as long as the
    weight's. (1, I), one per input, fits a weight (1, I) too, and its columns would be divided by the norm of the row.
    """
    return weight_shape(layer)[0] > 1


@dataclass(frozen=True)
class DoraArguments:
    """The network arguments of DoRA."""

    dora_wd: bool = declare(SWITCH, False)
    """Train magnitudes of the changed weight (DoRA), for low ranks (4 to 8); slower."""
    dora_constant_norm: bool = declare(SWITCH, False, needs="dora_wd")
    """Leave the norm out of the backward pass, as the paper does to save memory."""
    wd_on_output: bool = declare(SWITCH, False, aliases=("wd_on_out",), needs="dora_wd")
    """One magnitude per output in place of one per input."""


class DoRA(ScaledDelta):
    """A change that rescales the weight W0 + dW to trained magnitudes; `Decompose` has the formulas.

    `dora_scale` holds the magnitudes. Those of columns, (1, I) or (1, I, 1, 1), scale the layer's input, so that no
    weight is built. Those of rows, (O, 1) or (O, 1, 1, 1), scale its output.
    """

    dora_scale: nn.Parameter

    def __init__(
        self,
        layer: nn.Module | None,
        delta: Delta,
        alpha: float,
        decomposition: "Decompose",
        drops: Dropout = NO_DROPOUT,
        has_scalar: bool = False,
        magnitudes: Tensor | None = None,
    ) -> None:
        """`magnitudes` are those of a file, not trained; by default they are trained and start at the norms of W0."""
        super().__init__(layer, delta, alpha, drops, has_scalar)
        self.decomposition = decomposition
        scalar = self._parameters.pop(SCALAR)  # magnitudes come first in the optimizer's parameter order
        initial = decomposition.magnitudes() if magnitudes is None else magnitudes
        self.register_parameter(DORA_SCALE, nn.Parameter(initial, requires_grad=magnitudes is None))
        self.register_parameter(SCALAR, scalar)

    @property
    def size(self) -> ChangeSize:
        return replace(super().size, magnitudes="output" if self.decomposition.is_per_output else "input")

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Return the layer's output with the change, in the shape and dtype of the layer's own output."""
        if self.training and self.drops.skips_this_call():
            return base(x)
        scales = self.scales()
        if self.decomposition.is_per_output:
            assert self.layer is not None
            base_out = base(x)
            out = scale_outputs(self.add_to(base_out, x, 1.0), scales.flatten(), self.layer)
            return out if strength == 1 else torch.lerp(base_out, out, strength)
        # W0 + s (c (W0 + dW) - W0) = (1 + s (c - 1)) W0 + s c dW, with the column scales c and the strength s.
        base_scales = scales if strength == 1 else 1 + strength * (scales - 1)
        return self.add_to(base(scale_columns(x, base_scales)), x, strength, scales)

    def scales(self) -> Tensor:
        """Return the factor of every column or row of the changed weight."""
        return self._scales(self.dora_scale)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        change = self.weight_for(base)
        base = base.to(torch.promote_types(base.dtype, change.dtype))
        return self.decomposition.merge(base, change, strength, self.dora_scale)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a file's tensors. Magnitudes that it lacks are set so that the layer computes W0 + dW."""
        self.load_state_dict({DORA_SCALE: self.dora_scale} | self.completed(tensors))
        if DORA_SCALE not in tensors:
            self.restart_magnitudes()

    @torch.no_grad()
    def restart_magnitudes(self) -> None:
        """Set the magnitudes to the norms of W0 + dW, so that the layer computes W0 + dW."""
        assert self.layer is not None
        device = get_weight(self.layer).device
        ones = torch.ones_like(self.dora_scale, device=device)
        self.dora_scale.copy_(ones / self._scales(ones, device))

    def _scales(self, magnitudes: Tensor, device: torch.device | None = None) -> Tensor:
        assert self.layer is not None
        strength = self.unit_strength
        # Autocast would compute a Tucker core's product with down in 16 bits, and with it the norms.
        with torch.autocast(self.dora_scale.device.type, enabled=False):
            up_OR, down_RN = self.factors()
        if device is not None:
            strength = strength.to(device) if isinstance(strength, Tensor) else strength
            up_OR, down_RN = up_OR.to(device), down_RN.to(device)
        return self.decomposition.scales(get_weight(self.layer), magnitudes, up_OR, down_RN, strength)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoRA":
        """Move or cast, without rounding magnitudes to 16 bits, which would change the base model's columns."""
        unrounded = self.dora_scale.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.dora_scale.dtype.itemsize == 2:
            self.dora_scale.data = unrounded.to(self.dora_scale.device)
        return self


def add_magnitudes(change: ScaledDelta, has_constant_norm: bool, is_per_output: bool) -> DoRA:
    """Return a change with the same delta that has magnitudes too."""
    assert change.layer is not None
    decomposition = Decompose(get_weight(change.layer), has_constant_norm, is_per_output)
    has_scalar = change.scalar is not None
    dora = DoRA(change.layer, change.delta, change.alpha_value, decomposition, change.drops, has_scalar)
    return dora.to(change.alpha.device)


class Decompose:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): W = m (W0 + dW) / norm(W0 + dW).

    m and the norm have one number per column, or per row with `is_per_output`, as in PEFT and in LyCORIS with
    wd_on_output. A column is all weights of one input channel, so its norm runs over outputs and kernel positions. A
    row is all weights of one output. m starts as the norm of W0, which is computed once. At strength s the weight is W0
    + s (W - W0).

    The norm needs no matrix of the size of W0. With dW = s B A:
    norm(W0 + dW)^2 = norm(W0)^2 + 2 s <B'W0, A> + s^2 <(B'B) A, A>, column by column, and
    norm(W0 + dW)^2 = norm(W0)^2 + 2 s <W0 A', B> + s^2 <B (A A'), B>, row by row.
    """

    def __init__(self, weight: Tensor | None, has_constant_norm: bool = False, is_per_output: bool = False) -> None:
        """`weight` (O, I) or (O, I, h, w) is W0. `has_constant_norm` excludes the norm from the backward pass.

        Without a weight, as in tools, only `merge` can be used.
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
        # Autocast would compute the products, and with them the norms, in 16 bits.
        with torch.autocast(weight.device.type, enabled=False):
            up_OR, down_RN = up_OR.to(dtype), down_RN.to(dtype)
            strength = strength.to(dtype) if isinstance(strength, Tensor) else strength
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_constant_norm):
                norms_K = self._squared_norms(weight, up_OR, down_RN, strength).clamp_min(TINY).sqrt()
            scales: Tensor = magnitudes.to(dtype) / (norms_K + self._eps).view(self._shape)
        return scales

    def merge(self, base: Tensor, change: Tensor, strength: float, magnitudes: Tensor | None) -> Tensor:
        """Merge at magnitudes of columns, (1, I, ...), or of rows, (O, 1, ...) or (O,), as their shape tells."""
        assert magnitudes is not None
        magnitudes = magnitudes.to(base)
        axis = 1 if magnitudes.dim() > 1 and magnitudes.shape[:2] == (1, base.shape[1]) else 0
        changed = base + change
        norms = torch.linalg.vector_norm(changed, dim=[d for d in range(changed.dim()) if d != axis], keepdim=True)
        # Readers of dora_scale add the epsilon to column norms; PEFT adds none to row norms, which must only not be 0.
        norms = norms + EPS if axis else norms.clamp_min(TINY**0.5)
        merged: Tensor = changed * (magnitudes.reshape(norms.shape) / norms)
        return merged if strength == 1 else base + strength * (merged - base)

    @property
    def _eps(self) -> float:
        """Number added to the norms: 0 for rows, as in PEFT."""
        return 0.0 if self.is_per_output else EPS

    def _squared_norms(self, weight: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float) -> Tensor:
        """Return the squared norm of W0 + strength * up @ down for every column or row."""
        # The norms of W0 are computed once. They follow a layer that is moved after the network was made.
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
        # Rounding can make the expansion zero or negative.
        norms_K = torch.maximum(self._squares_K + changes_K, LOST * self._squares_K)
        return self._direct_where_cancelled(norms_K, weight, up_OR, down_RN, strength)

    def _direct_where_cancelled(
        self, norms_K: Tensor, weight: Tensor, up_OR: Tensor, down_RN: Tensor, strength: Tensor | float
    ) -> Tensor:
        """Sum the norms of columns or rows directly if the change almost cancels them.

        At most MAX_DIRECT are summed. The number is fixed so that a GPU needs no synchronisation with the host.
        """
        shares_K = norms_K.detach() / self._squares_K.clamp_min(TINY)
        # The short cut asks for values: on a GPU the host would wait for them, and a compiled graph would break. There
        # the direct sums are always computed.
        on_host = weight.device == HOST and not torch.compiler.is_compiling()
        if on_host and bool((shares_K >= CANCELLED).all()):
            return norms_K
        shares, indices = torch.topk(shares_K, min(MAX_DIRECT, len(shares_K)), largest=False)
        if self.is_per_output:
            changed = weight[indices].to(up_OR.dtype).flatten(1) + strength * (up_OR[indices] @ down_RN)
            direct = changed.square().sum(1)
        else:
            base = weight[:, indices].to(up_OR.dtype).flatten(1)
            down_chosen = down_RN.view(len(down_RN), weight.shape[1], -1)[:, indices].flatten(1)
            changed = base + strength * (up_OR @ down_chosen)
            direct = changed.square().sum(0).view(len(indices), -1).sum(1)
        return norms_K.index_put((indices,), torch.where(shares < CANCELLED, direct, norms_K[indices]))


class _Project(torch.autograd.Function):
    """up' @ W0 for a frozen W0 of any dtype and memory format, in the dtype of `up` without a full copy of W0."""

    @staticmethod
    def forward(ctx: Any, up_OR: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        # Autograd keeps W0 itself, which the layer has anyway; of a plain product it would keep the copy in the dtype
        # of `up`.
        projected_RN = up_OR.new_zeros(up_OR.shape[1], weight[0].numel())
        for rows in _row_slices(weight, up_OR.dtype):
            projected_RN.addmm_(up_OR[rows].t(), _as_matrix(weight[rows], up_OR.dtype))
        return projected_RN

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad_RN.device.type, enabled=False):
            return _multiply_rows(weight, grad_RN.t()), None


class _ProjectRows(torch.autograd.Function):
    """W0 @ down' for a frozen W0 of any dtype and memory format, in the dtype of `down` without a full copy of W0."""

    @staticmethod
    def forward(ctx: Any, down_RN: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiply_rows(weight, down_RN.t())

    @staticmethod
    def backward(ctx: Any, grad_OR: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad_OR.device.type, enabled=False):
            grad_RN = grad_OR.new_zeros(grad_OR.shape[1], weight[0].numel())
            for rows in _row_slices(weight, grad_OR.dtype):
                grad_RN.addmm_(grad_OR[rows].t(), _as_matrix(weight[rows], grad_OR.dtype))
            return grad_RN, None


class _ScaleColumns(torch.autograd.Function):
    """x times a factor per column, computed in float32 and rounded once to the dtype of x.

    Rounding the factor would lose more: bf16 has no number between 1 and 1.0078. A factor very near 1 changes few
    values of a 16-bit x. It takes full effect on a float32 x, which normalisation layers return under autocast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(x, columns)
        # With `out` torch computes in the wider dtype and rounds once to that of x.
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
    """Return x with its input channels scaled by `columns`: (1, I) on the last axis, or (1, I, 1, 1) on axis 1 of 4."""
    per_axis = columns if columns.dim() == x.dim() else columns.view(*(1,) * (x.dim() - 1), -1)
    scaled: Tensor = _ScaleColumns.apply(x, per_axis)  # type: ignore[no-untyped-call]
    return scaled


def scale_outputs(out: Tensor, scales_O: Tensor, layer: nn.Module) -> Tensor:
    """Scale the outputs of a layer by `scales_O`, except its bias."""
    shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (1, -1)
    scaled = scale_columns(out, scales_O.view(shape))
    bias = layer.bias
    if not isinstance(bias, Tensor):
        return scaled
    # The output includes the bias, which a change of the weight must not scale: s * bias + (1 - s) * bias = bias.
    bias_change = (bias * (1 - scales_O)).view(shape if len(shape) == 4 else (-1,))
    return scaled + bias_change.to(scaled.dtype)


def squared_columns(weight: Tensor) -> Tensor:
    """Return the squared norm of every column of a weight (O, I) or (O, I, h, w), in float32 or wider."""
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        sums_N = [_as_matrix(weight[rows], dtype).square().sum(0) for rows in _row_slices(weight, dtype)]
        return torch.stack(sums_N).sum(0).view(weight.shape[1], -1).sum(1)


def squared_rows(weight: Tensor) -> Tensor:
    """Return the squared norm of every row of a weight (O, I) or (O, I, h, w), in float32 or wider."""
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.cat([_as_matrix(weight[rows], dtype).square().sum(1) for rows in _row_slices(weight, dtype)])


def _row_slices(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return slices of rows that `_as_matrix` is to convert one at a time: one slice if it needs no copy, else a few.

    This is a list because torch 2.15 cannot compile generators of tensors.
    """
    is_view = weight.dtype == dtype and weight.is_contiguous()
    # A cast, or flattening a channels-last weight, makes a copy. In parts that copy stays small.
    step = len(weight) if is_view else max(1, CHUNK_VALUES // weight[0].numel())
    return [slice(first, first + step) for first in range(0, len(weight), step)]


def _as_matrix(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of a weight as a matrix (O, N) in `dtype`."""
    return rows.to(dtype).flatten(1)


def _multiply_rows(weight: Tensor, right_NR: Tensor) -> Tensor:
    """Return the weight, as a matrix (O, N), times `right_NR`, without a full copy of the weight in another dtype."""
    dtype = right_NR.dtype
    return torch.cat([_as_matrix(weight[rows], dtype) @ right_NR for rows in _row_slices(weight, dtype)])
