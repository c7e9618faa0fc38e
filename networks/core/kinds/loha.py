"""LoHa: the change of a weight as the elementwise (Hadamard) product of two low-rank products.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

import re
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from networks.core.changes.additive import read_with, wrap
from networks.core.changes.change import Change, ModuleTensors, check_kernel, get_weight
from networks.core.changes.low_rank import add_product, run_like
from networks.core.changes.request import ChangeRequest
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

NEEDS = W1_A, W1_B, W2_A, W2_B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
CORE = "hada_t1", "hada_t2"
# Files do not store the kernel size. Only the U-Nets of SD have kernels larger than 1x1: 3x3, under these names.
IS_3X3 = re.compile(r".*[_.](conv[12]?|conv_in|conv_out|op|in_layers[_.]2|out_layers[_.]3|input_blocks[_.]0[_.]0)")


class LoHa(nn.Module):
    """LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): dW = (w1_a w1_b) * (w2_a w2_b), of rank R^2.

    `hada_w1_a` and `hada_w2_a` are (O, R), `hada_w1_b` and `hada_w2_b` (R, N). With a Tucker core they are (R, O) and
    (R, I), and `hada_t1` and `hada_t2` (R, R, h, w) are between them. All are float32 and normal: `hada_w1_b` and
    `hada_w2_b` with deviation 1, the others with 0.1, except `hada_w2_a`, which starts at zero. Names, shapes and
    initial values are those of LyCORIS.

    dW is also a product of two factors of rank R^2, so a layer runs as with LoRA. If that costs more than the full
    matrix, the matrix is built, and autograd keeps only the factors.
    """

    is_whole = False
    fast_key = W2_A

    def __init__(self, layer: nn.Module, rank: int, has_core: bool = False) -> None:
        super().__init__()
        self.rank, self.has_core, self.shape = rank, has_core, tuple(get_weight(layer).shape)
        self.layer: nn.Module
        object.__setattr__(self, "layer", check_kernel(layer))  # not registered: it belongs to the base model
        num_outputs, num_columns = self.shape[0], prod(self.shape[1:])
        # Two factors of rank R^2 have R^2 (O + N) numbers to multiply by, the whole matrix has O N.
        self.is_narrow = rank**2 * (num_outputs + num_columns) < num_outputs * num_columns
        a, b = ((rank, num_outputs), (rank, self.shape[1])) if has_core else ((num_outputs, rank), (rank, num_columns))
        cores = dict.fromkeys(CORE if has_core else (), (rank, rank, *self.shape[2:]))
        for name, shape in {W1_A: a, W1_B: b, W2_A: a, W2_B: b, **cores}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))
        for name, std in (*((core, 0.1) for core in cores), (W1_B, 1.0), (W1_A, 0.1), (W2_B, 1.0)):
            nn.init.normal_(self.get_parameter(name), std=std)

    def start_moving(self) -> None:
        nn.init.normal_(self.get_parameter(W2_A), std=0.1)

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        weight = self.factors()[1].view(-1, *self.shape[1:]) if self.is_narrow else self.weight()
        return run_like(self.layer, x, weight, columns)

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        if not self.is_narrow:
            return base + hidden.to(base.dtype)
        up_OR = self.factors()[0]
        return add_product(base, hidden, up_OR.view(*up_OR.shape, *(1,) * (len(self.shape) - 2)))

    def factors(self) -> tuple[Tensor, Tensor]:
        return factor_hadamard(*self._pairs())

    def weight(self) -> Tensor:
        # ScaledDelta applies alpha / rank once, as LyCORIS's forward pass does; its get_merged_weight applies it twice.
        return hadamard(*self._pairs()).view(self.shape)

    def _pairs(self) -> list[Tensor]:
        """Return w1_a (O, R), w1_b (R, N), w2_a and w2_b. A core is multiplied into w1_b or w2_b."""
        pairs: list[Tensor] = [self.get_parameter(name) for name in NEEDS]
        for n, core in enumerate(CORE if self.has_core else ()):
            rows = torch.einsum("pqhw,qi->pihw", self.get_parameter(core), pairs[2 * n + 1]).flatten(1)
            pairs[2 * n : 2 * n + 2] = pairs[2 * n].t(), rows
        return pairs


def factor_hadamard(a1_OR: Tensor, b1_RN: Tensor, a2_OR: Tensor, b2_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Return (up, down) with up @ down = (a1 b1) * (a2 b2): all R^2 products of a column of a1 and one of a2."""
    up = (a1_OR[:, :, None] * a2_OR[:, None]).flatten(1)
    return up, (b1_RN[:, None] * b2_RN[None]).flatten(0, 1)


def hadamard(a1_OR: Tensor, b1_RN: Tensor, a2_OR: Tensor, b2_RN: Tensor) -> Tensor:
    """Return (a1 b1) * (a2 b2) in the dtype of the factors; autograd keeps these and neither of the two matrices."""
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
            first_grad = (a2 @ b2).mul_(grad)
            factor_grads = first_grad @ b1.t(), a1.t() @ first_grad
            # The first gradient has been used. Its memory, as large as the weight, is used again.
            second_grad = torch.matmul(a1, b1, out=first_grad).mul_(grad)
            return *factor_grads, second_grad @ b2.t(), a2.t() @ second_grad


def shape_of(name: str, tensors: ModuleTensors) -> tuple[int, ...]:
    """Return the shape of the weight; (O, N) if neither a core nor the name shows that it is a convolution."""
    a, b = tensors[W1_A], tensors[W1_B]
    if CORE[0] in tensors:
        return (a.shape[1], b.shape[1], *tensors[CORE[0]].shape[2:])
    is_3x3 = b.shape[1] % 9 == 0 and IS_3X3.fullmatch(name) is not None
    return (a.shape[0], b.shape[1] // 9, 3, 3) if is_3x3 else (a.shape[0], b.shape[1])


def rank_of(tensors: ModuleTensors) -> int:
    return tensors[W1_B].shape[0]


def make(request: ChangeRequest) -> Change:
    return wrap(request, LoHa(request.layer, request.rank, request.has_core))


LAYOUT = KeyLayout(
    "loha", "LoHa", NEEDS, read_with(LoHa, rank_of, shape_of, partial(LoHa, has_core=True), CORE), CORE,
    rank_of=rank_of, shape_of=shape_of, is_low_rank=True, scaled=W2_A, namings=frozenset(("kohya", "generic")),
    network_module="networks.loha",
)  # fmt: skip
KIND = AdapterKind(
    (LAYOUT,), make, "networks.loha", refuses={"split_qkv": "all rows of a layer share the four factors"}
)
