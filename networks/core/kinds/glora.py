"""GLoRA as in LyCORIS: a low-rank change of a layer's inputs and one of its weight. It is merged, but not trained.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from networks.core.changes.change import MergedOnly, Misfit, ModuleTensors, match_shape
from networks.core.changes.parameter_keys import ALPHA
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

NEEDS = A1, A2, B1, B2 = "a1.weight", "a2.weight", "b1.weight", "b2.weight"


class GLoRA(MergedOnly):
    """GLoRA (Chavan et al. 2023, arXiv:2306.07967) as in LyCORIS: W + alpha / R (W a1 a2 + b1 b2).

    `a1.weight` is (I, R), `a2.weight` (R, I), `b1.weight` (O, R), `b2.weight` (R, I) or (R, I, h, w). For convolutions
    the first three have a 1x1 kernel.
    """

    words = "GLoRA of LyCORIS"

    def __init__(self, tensors: ModuleTensors) -> None:
        super().__init__()
        for key in NEEDS:
            factor = nn.Module()
            factor.register_buffer("weight", tensors[key])
            self.add_module(key.partition(".")[0], factor)
        self.register_buffer(ALPHA, tensors.get(ALPHA))

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        weight_delta = self._weight_alone()
        if match_shape(weight_delta, base).shape != base.shape:
            raise Misfit("", tuple(weight_delta.shape), tuple(base.shape))
        a1_IR, a2_RI = (self._matrix(key).to(base.device) for key in (A1, A2))
        # The kernel's axes come first, so that the inputs are the columns.
        input_delta = (base.movedim(1, -1) @ a1_IR @ a2_RI).movedim(-1, 1)
        return base + strength * self._scale * (input_delta + match_shape(weight_delta, base).to(base.device))

    def norm(self) -> Tensor:
        """Return the norm of a1 a2 and b1 b2 together. The norm of W a1 a2 would depend on the weight."""
        inputs = self._matrix(A1) @ self._matrix(A2)
        return self._scale * torch.hypot(inputs.norm(), self._weight_alone().norm())

    def scale_(self, ratio: Tensor) -> None:
        for key in (A2, B2):
            factor = self.get_buffer(key)
            factor.mul_(ratio.to(factor))

    @property
    def _scale(self) -> float:
        alpha = self.get_buffer(ALPHA) if self.alpha is not None else None
        return 1.0 if alpha is None else float(alpha) / len(self._matrix(A2))

    def _matrix(self, key: str) -> Tensor:
        return self.get_buffer(key).flatten(1)

    def _weight_alone(self) -> Tensor:
        """Return b1 b2, the part of the change that does not depend on the weight."""
        b2 = self.get_buffer(B2)
        return (self._matrix(B1) @ self._matrix(B2)).reshape(-1, *b2.shape[1:])


def rank_of(tensors: ModuleTensors) -> int:
    return tensors[A2].shape[0]


def shape_of(name: str, tensors: ModuleTensors) -> tuple[int, ...]:
    return (tensors[B1].shape[0], *tensors[B2].shape[1:])


def fault(name: str, tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why the factors of a module do not fit together, or None if they do."""
    if not all(key in tensors for key in NEEDS):
        return None  # reported as missing by the caller
    ranks = [tensors[A1].shape[1], tensors[A2].shape[0], tensors[B1].shape[1], tensors[B2].shape[0]]
    if len(set(ranks)) == 1 and tensors[A1].shape[0] == tensors[A2].shape[1] == tensors[B2].shape[1]:
        return None
    shapes = ", ".join(str(list(tensors[key].shape)) for key in NEEDS)
    return f": the factors of {name} do not fit together: a1, a2, b1 and b2 are {shapes}; LyCORIS before 2.0 has others"


LAYOUT = KeyLayout(
    name="glora", words="GLoRA", needs=NEEDS, read=lambda tensors, _: GLoRA(tensors), may_have=(ALPHA,),
    rank_of=rank_of, shape_of=shape_of, fault=fault,
)  # fmt: skip
KIND = AdapterKind(merged_layouts=(LAYOUT,))
