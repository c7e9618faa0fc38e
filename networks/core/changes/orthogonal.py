"""Changes that rotate the inputs of a layer by an orthogonal matrix instead of adding to its weight: OFT, BOFT.

Letters: O output features or channels, I input features or channels, h w kernel, N = I * h * w, F factors, D blocks, b
block size, T all axes but the last.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from networks.core.changes.alpha import SCALAR
from networks.core.changes.blocks import row_length
from networks.core.changes.change import ChangeSize, Forward, Misfit, check_kernel
from networks.core.changes.dora import scale_outputs
from networks.core.changes.dropout import NO_DROPOUT, Dropout


class Rotation(Protocol):
    """An orthogonal N x N matrix R with few parameters, which are named as in files.

    R is a product of F factors. Each has D blocks of b x b on its diagonal and a different order of its inputs, see
    `rotate`. D is N / b, or 1 if all inputs share one block. Implementations are modules.
    """

    block_size: int
    exact: tuple[str, ...]  # never rounded to 16 bits, which would change the base weights they multiply

    def angles(self, scalar: Tensor | float) -> Tensor:
        """Return the skew-symmetric angles times `scalar`, (F, D, b, b). The rotations are 1 + 2 angles + ..."""
        ...

    def residuals(self, angles_FDbb: Tensor) -> Tensor:
        """Return R - 1 for these angles: the blocks minus the identity, (F, D, b, b)."""
        ...

    def output_scales(self) -> Tensor | None:
        """Return the scale of each output, or None if outputs are not scaled."""
        ...

    def start_moving(self) -> None:
        """Draw the parameters that start at zero. A trained strength of 0 keeps R at the identity (use_scalar)."""
        ...

    def scale_(self, ratio: Tensor, scalar: Tensor | float) -> None:
        """Multiply the angles, and the differences of the scales from 1, by `ratio`."""
        ...

    def in_files(self, scalar: Tensor | float) -> Mapping[str, Tensor]:
        """Return the tensors as stored in files, with the trained strength multiplied in."""
        ...


class Orthogonal(nn.Module):
    """A rotation of a layer's inputs: y = base(x R), so W' = W R'. R keeps the lengths of W's rows and their angles.

    A Linear layer or 1x1 convolution gets x R, without a matrix of the weight's size. For a larger kernel the patches
    would be h * w times the input, so R rotates the weight, which is not kept for the backward pass. At strength s the
    weight is W + s (W' - W), as in sd-scripts.

    In training, dropout replaces single blocks by the identity. There is no alpha.
    """

    changed_parameters = ("weight",)
    fast_keys: frozenset[str] = frozenset()
    scalar: nn.Parameter | None

    def __init__(
        self, layer: nn.Module | None, rotation: Rotation, drops: Dropout = NO_DROPOUT, has_scalar: bool = False
    ) -> None:
        """`layer` can be None if the change is only merged."""
        super().__init__()
        assert isinstance(rotation, nn.Module)
        for name, child in rotation.named_children():
            self.add_module(name, child)
        for name, parameter in rotation.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(self, "layer", layer if layer is None else check_kernel(layer))
        self.rotation: Rotation
        self.layer: nn.Module | None
        self.drops = drops
        self.register_parameter(SCALAR, nn.Parameter(torch.tensor(0.0)) if has_scalar else None)
        if has_scalar:
            rotation.start_moving()

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Return the layer's output with the change, in the shape and dtype of the layer's own output."""
        if self.training and self.drops.skips_this_call():
            return base(x)
        # Autocast would multiply the angles in 16 bits, and the blocks would be less orthogonal.
        with torch.autocast(x.device.type, enabled=False):
            residuals = self._drop(self._residuals())
        scales_O = self.rotation.output_scales()
        if scales_O is None:
            return self._run_rotated(x, base, residuals, strength)
        assert self.layer is not None
        out = scale_outputs(self._run_rotated(x, base, residuals, 1.0), scales_O, self.layer)
        return out if strength == 1 else torch.lerp(base_out := base(x), out.to(base_out.dtype), strength)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        residuals = self._residuals()
        num_blocks, block_size = residuals.shape[1:3]
        num_columns, num_rotated = base[0].numel(), num_blocks * block_size
        scales_O = self.rotation.output_scales()
        num_rows = len(base) if scales_O is None else len(scales_O)
        if num_columns % block_size or (num_blocks > 1 and num_columns != num_rotated) or num_rows != len(base):
            raise Misfit("", (num_rows, num_rotated), tuple(base.shape))
        base = base.to(torch.promote_types(base.dtype, residuals.dtype))
        rotated = rotate_rows(base, residuals.to(base))
        if scales_O is not None:
            rotated = rotated * scales_O.to(base).view(-1, *(1,) * (base.dim() - 1))
        return rotated if strength == 1 else base + strength * (rotated - base)

    @property
    def size(self) -> ChangeSize:
        return ChangeSize(self.rotation.block_size, block_sizes=(self.rotation.block_size,))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Frobenius norm of R - 1, to first order, together with the differences of the scales from 1."""
        angles = self.rotation.angles(self._scalar)
        # R - 1 is 2 * angles to first order.
        square = angles.square().sum() * 4
        if angles.shape[1] == 1 and self.layer is not None:
            square = square * (row_length(self.layer) // angles.shape[2])  # all inputs share the one block
        scales_O = self.rotation.output_scales()
        return (square if scales_O is None else square + (scales_O - 1).square().sum()).sqrt()

    @torch.no_grad()
    def scale_(self, ratio: Tensor) -> None:
        self.rotation.scale_(ratio, self._scalar)

    def stored_tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors as stored in files, with the trained strength multiplied into the angles."""
        return self.rotation.in_files(self._scalar)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a file's tensors; a trained strength becomes 1."""
        self.load_state_dict({**({} if self.scalar is None else {SCALAR: torch.ones(())}), **tensors})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Orthogonal":
        """Move or cast the tensors, without rounding those in `rotation.exact` to 16 bits."""
        unrounded = {name: self.get_parameter(name).detach() for name in self.rotation.exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in unrounded.items():
            if (parameter := self.get_parameter(name)).dtype.itemsize == 2:
                parameter.data = tensor.to(parameter.device)
        return self

    @property
    def _scalar(self) -> Tensor | float:
        return 1.0 if self.scalar is None else self.scalar

    def _residuals(self) -> Tensor:
        return self.rotation.residuals(self.rotation.angles(self._scalar))

    def _drop(self, residuals: Tensor) -> Tensor:
        """Drop blocks in training. A block that all inputs share is never dropped."""
        if not self.training or self.drops.neuron == 0 or residuals.shape[1] == 1:
            return residuals
        keep_FD = torch.rand(residuals.shape[:2], device=residuals.device) > self.drops.neuron
        return residuals * keep_FD[..., None, None].to(residuals.dtype)

    def _run_rotated(self, x: Tensor, base: Forward, residuals: Tensor, strength: float) -> Tensor:
        """Run the layer on rotated inputs."""
        if not isinstance(self.layer, nn.Conv2d):
            return base(x + strength * rotation_change(x, residuals))
        if self.layer.kernel_size == (1, 1):
            pixels = x.movedim(1, -1)
            return base(x + strength * rotation_change(pixels, residuals).movedim(-1, 1))
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not know the custom function, so the input is cast here, as autocast does for conv2d.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _OrthogonalConv.apply(x, residuals, self.layer, strength)  # type: ignore[no-untyped-call]
        return out


def rotate(x_TN: Tensor, residuals: Tensor, is_transposed: bool = False) -> Tensor:
    """Return x R, or x R' with `is_transposed`.

    R is the product of P_i (1 + residuals_i) P_i' from the last factor to the first, as in BOFT (Liu et al. 2024,
    arXiv:2311.06243). P_0 is the identity. P_i permutes every 2^(i + 1) neighbouring half blocks, so that half blocks
    that are 2^i apart form one block. A transposition of axes changes the order; no N x N matrix is built.
    """
    num_factors = len(residuals)
    for i in range(num_factors) if is_transposed else reversed(range(num_factors)):
        blocks_Dbb = residuals[i].mT if is_transposed else residuals[i]
        x_TN = x_TN + _unshuffle(_through(_shuffle(x_TN, blocks_Dbb, i), blocks_Dbb), blocks_Dbb, i)
    return x_TN


def rotation_change(x_TN: Tensor, residuals: Tensor) -> Tensor:
    """Return x R - x. R is near the identity, and 16 bits represent the difference more accurately than R."""
    if not torch.is_autocast_enabled(x_TN.device.type):
        residuals = residuals.to(x_TN.dtype)
    if len(residuals) == 1:
        return _through(x_TN, residuals[0])
    return rotate(x_TN, residuals) - x_TN


def rotate_rows(weight: Tensor, residuals: Tensor) -> Tensor:
    """Return W R' for a weight (O, I) or (O, I, h, w): every row of N numbers is rotated."""
    return rotate(weight.flatten(1), residuals, is_transposed=True).view_as(weight)


def _through(x_TN: Tensor, blocks_Dbb: Tensor) -> Tensor:
    """Multiply every b numbers of x by their block."""
    parts = x_TN.reshape(*x_TN.shape[:-1], -1, blocks_Dbb.shape[-1])
    if len(blocks_Dbb) == 1:
        return (parts @ blocks_Dbb[0]).flatten(-2)
    products: Tensor = torch.einsum("...db,dbc->...dc", parts, blocks_Dbb)
    return products.flatten(-2)


def _shuffle(x_TN: Tensor, blocks_Dbb: Tensor, i: int) -> Tensor:
    """Return x P_i."""
    half = blocks_Dbb.shape[-1] // 2
    return x_TN if i == 0 else x_TN.reshape(*x_TN.shape[:-1], -1, 2, 2**i, half).transpose(-3, -2).flatten(-4)


def _unshuffle(x_TN: Tensor, blocks_Dbb: Tensor, i: int) -> Tensor:
    """Return x P_i'."""
    half = blocks_Dbb.shape[-1] // 2
    return x_TN if i == 0 else x_TN.reshape(*x_TN.shape[:-1], -1, 2**i, 2, half).transpose(-3, -2).flatten(-4)


class _OrthogonalConv(torch.autograd.Function):
    """A convolution with a rotated weight that keeps only the rotation and the input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residuals: Tensor, layer: nn.Conv2d, strength: float) -> Tensor:
        ctx.save_for_backward(x, residuals)
        ctx.layer, ctx.strength = layer, strength
        weight = _weight_between(layer, residuals, strength).to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, residuals = ctx.saved_tensors
        layer: nn.Conv2d = ctx.layer
        geometry: Any = (layer.stride, layer.padding, layer.dilation)
        with torch.autocast(gradient.device.type, enabled=False), torch.enable_grad():
            # The rotated weight was not kept: it is built again, now with a graph that leads back to the residuals.
            residuals = residuals.detach().requires_grad_()
            weight = _weight_between(layer, residuals, ctx.strength)
            x_gradient = residuals_gradient = None
            if ctx.needs_input_grad[0]:
                x_gradient = conv2d_input(x.shape, weight.detach().to(gradient.dtype), gradient, *geometry)  # type: ignore[no-untyped-call]
            if ctx.needs_input_grad[1]:
                weight_gradient = conv2d_weight(x, weight.shape, gradient, *geometry)  # type: ignore[no-untyped-call]
                (residuals_gradient,) = torch.autograd.grad(weight, residuals, weight_gradient.to(weight.dtype))
        return x_gradient, residuals_gradient, None, None


def _weight_between(layer: nn.Conv2d, residuals: Tensor, strength: float) -> Tensor:
    """Return W + strength (W R' - W) in the dtype of the rotation."""
    weight = layer.weight.detach().to(residuals.dtype)
    rotated = rotate_rows(weight, residuals)
    return rotated if strength == 1 else weight + strength * (rotated - weight)
