"""Element-wise operations of our denoisers, fused on GPUs.

Letters: B samples, N heads, T tokens, D head width, M model width, H width of an MLP.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import silu

from library.memory.fused_kernels import Fused
from library.models.rotary import Rope


def modulated_norm_of(x_BTM: Tensor, shift_B1M: Tensor | None, scale_B1M: Tensor) -> Tensor:
    y_BTM = functional.layer_norm(x_BTM, x_BTM.shape[-1:], eps=1e-6) * (1 + scale_B1M)
    return y_BTM if shift_B1M is None else y_BTM + shift_B1M


def parted_norm_of(x_BTM: Tensor, scale_B1M: Tensor, second_B1M: Tensor, is_second_T1: Tensor) -> Tensor:
    return modulated_norm_of(x_BTM, None, torch.where(is_second_T1 > 0, second_B1M, scale_B1M))


def scaled_norm_of(x_BTM: Tensor, weight_M: Tensor, scale_B1M: Tensor | None) -> Tensor:
    y_BTM = functional.rms_norm(x_BTM, weight_M.shape, weight_M, eps=1e-5)
    return y_BTM if scale_B1M is None else y_BTM * scale_B1M


def shifted_norm_of(x_BTM: Tensor, weight_M: Tensor, scale_B1M: Tensor | None, shift_B1M: Tensor | None) -> Tensor:
    """An RMS norm with the factor 1 + `weight_M`, in float32, then scaled and shifted."""
    y_BTM = functional.rms_norm(x_BTM.float(), weight_M.shape, weight_M.float() + 1, eps=1e-5).to(x_BTM.dtype)
    y_BTM = y_BTM if scale_B1M is None else y_BTM * (1 + scale_B1M)
    return y_BTM if shift_B1M is None else y_BTM + shift_B1M


def modulated_rms_norm(eps: float) -> Fused:
    """Build the operation that scales the RMS norm of (x_BTM, weight_M) by 1 + scale_B1M and adds shift_B1M."""

    def modulated_rms_norm_of(x_BTM: Tensor, weight_M: Tensor, scale_B1M: Tensor, shift_B1M: Tensor) -> Tensor:
        return functional.rms_norm(x_BTM, weight_M.shape, weight_M, eps) * (1 + scale_B1M) + shift_B1M

    return Fused(modulated_rms_norm_of, {0: (0, 1, 2), 1: (0, 2), 2: (0, 1), 3: ()})


def gated_sum_of(x_BTM: Tensor, gate_B1M: Tensor, y_BTM: Tensor) -> Tensor:
    return x_BTM + gate_B1M * y_BTM


def parted_sum_of(x_BTM: Tensor, gate_B1M: Tensor, second_B1M: Tensor, y_BTM: Tensor, is_second_T1: Tensor) -> Tensor:
    return gated_sum_of(x_BTM, torch.where(is_second_T1 > 0, second_B1M, gate_B1M), y_BTM)


def gated_norm_sum_of(x_BTM: Tensor, gate_B1M: Tensor | None, y_BTM: Tensor, weight_M: Tensor) -> Tensor:
    return x_BTM + scaled_norm_of(y_BTM, weight_M, gate_B1M)


def silu_product_of(gate_BTH: Tensor, value_BTH: Tensor) -> Tensor:
    return silu(gate_BTH) * value_BTH


def sigmoid_product_of(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)


def swiglu_of(halves: Tensor) -> Tensor:
    return silu_product_of(*halves.chunk(2, dim=-1))


def rotated_norm(eps: float) -> Fused:
    """Build the operation that scales the RMS norm of (x_BNTD, weight_D) and rotates it by a `Rope`."""

    def rotated_norm_of(x_BNTD: Tensor, weight_D: Tensor, rope: Rope) -> Tensor:
        # One loop over pairs, because Inductor does not fuse loops over D and over pairs.
        pairs, weights = (values.unflatten(-1, (-1, 2)) for values in (x_BNTD, weight_D))  # type: ignore[no-untyped-call]
        normal = pairs * torch.rsqrt(pairs.square().mean((-2, -1), keepdim=True) + eps) * weights
        cos, sin = rope[..., :1], rope[..., 1:]
        signs = torch.arange(-1, 2, 2, device=rope.device)
        rotated: Tensor = (normal * cos + normal.flip(-1) * (sin * signs)).flatten(-2)
        return rotated

    return Fused(rotated_norm_of, {0: (0, 1, 2), 1: (0, 2)})


def rotated_norm_of_halves(eps: float) -> Fused:
    """Build the operation of `rotated_norm` for heads of which values j and j + D / 2 are a pair."""

    # Apart from `rotated_norm`: torch.compile takes an axis or a size that is not literal as one that varies.
    def rotated_norm_of_halves_of(x_BNTD: Tensor, weight_D: Tensor, rope: Rope) -> Tensor:
        halves, weights = (values.unflatten(-1, (2, -1)) for values in (x_BNTD, weight_D))  # type: ignore[no-untyped-call]
        normal = halves * torch.rsqrt(halves.square().mean((-2, -1), keepdim=True) + eps) * weights
        cos, sin = rope[..., 0].unsqueeze(-2), rope[..., 1].unsqueeze(-2)
        signs = torch.arange(-1, 2, 2, device=rope.device)[:, None]
        rotated: Tensor = (normal * cos + normal.flip(-2) * (sin * signs)).flatten(-2)
        return rotated

    return Fused(rotated_norm_of_halves_of, {0: (0, 1, 2), 1: (0, 2)})


modulated_norm = Fused(modulated_norm_of, {0: (0, 2), 1: (), 2: (0,)})
scaled_norm = Fused(scaled_norm_of, {0: (0, 1, 2), 1: (0, 2), 2: (0, 1)})
shifted_norm = Fused(shifted_norm_of, {0: (0, 1, 2), 1: (0, 2), 2: (0, 1), 3: ()})
gated_sum = Fused(gated_sum_of, {0: (), 1: (2,), 2: (1,)})
parted_norm = Fused(parted_norm_of, {0: (0, 1, 2, 3), 1: (0, 3), 2: (0, 3)})
parted_sum = Fused(parted_sum_of, {0: (), 1: (3, 4), 2: (3, 4), 3: (1, 2, 4)})
gated_norm_sum = Fused(gated_norm_sum_of, {0: (), 1: (2, 3), 2: (1, 2, 3), 3: (1, 2)})
silu_product = Fused(silu_product_of, {0: (0, 1), 1: (0, 1)})
sigmoid_product = Fused(sigmoid_product_of, {0: (1,), 1: (0, 1)})
swiglu = Fused(swiglu_of, {0: (0,)}, widens=False)  # the gradient's halves would be joined in float32
