"""8-bit weights as checkpoint files have them: they are decoded here and never encoded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.codecs.codec import Parts
from library.memory.codecs.matmul_8bit import Codes


@dataclass(frozen=True)
class Scaled:
    """Two parts: 8-bit `codes` (O, I), and `scales` for all, for each row, or for each group of a row.

    `times(codes, scales)` multiplies them out, `turn` undoes what was done to the inputs before.
    """

    times: Callable[[Tensor, Tensor], Tensor]
    turn: Callable[[Tensor], Tensor] | None = None

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values = self.times(parts["codes"].to(dtype), parts["scales"])
        return (values if self.turn is None else self.turn(values)).reshape(shape)

    def codes(self, parts: Parts) -> Codes:
        return Codes(parts["codes"], parts["scales"], self.turn)
