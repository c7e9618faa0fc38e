"""8-bit weights as checkpoint files store them: decoded here, never encoded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.codecs.codec import Parts
from library.memory.codecs.matmul_8bit import Codes


@dataclass(frozen=True)
class Scaled:
    """Storage in two parts: 8-bit `codes` (O, I), and `scales` per tensor, per row or per group within a row.

    `times(codes, scales)` multiplies them. `rotation` undoes a rotation of the inputs.
    """

    times: Callable[[Tensor, Tensor], Tensor]
    rotation: Callable[[Tensor], Tensor] | None = None

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values = self.times(parts["codes"].to(dtype), parts["scales"])
        return (values if self.rotation is None else self.rotation(values)).reshape(shape)

    def codes(self, parts: Parts) -> Codes:
        return Codes(parts["codes"], parts["scales"], self.rotation)
