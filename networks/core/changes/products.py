"""Two products of small factors, multiplied number by number.

Letters: O rows, N columns, R rank.
"""

from typing import Any

import torch
from torch import Tensor


def factors(a1_OR: Tensor, b1_RN: Tensor, a2_OR: Tensor, b2_RN: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) with up @ down = (a1 b1) * (a2 b2): every product of a column of a1 and one of a2, R^2 of them."""
    up = (a1_OR[:, :, None] * a2_OR[:, None]).flatten(1)
    return up, (b1_RN[:, None] * b2_RN[None]).flatten(0, 1)


def hadamard(a1_OR: Tensor, b1_RN: Tensor, a2_OR: Tensor, b2_RN: Tensor) -> Tensor:
    """(a1 b1) * (a2 b2) in the dtype of the factors; autograd keeps these and neither of the two matrices."""
    product: Tensor = _Hadamard.apply(a1_OR, b1_RN, a2_OR, b2_RN)  # type: ignore[no-untyped-call]
    return product


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        with torch.autocast(a1.device.type, enabled=False):
            return (a1 @ b1).mul_(a2 @ b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a1, b1, a2, b2 = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            of_first = (a2 @ b2).mul_(grad)
            first = of_first @ b1.t(), a1.t() @ of_first
            of_second = torch.matmul(a1, b1, out=of_first).mul_(grad)
            return *first, of_second @ b2.t(), a2.t() @ of_second
