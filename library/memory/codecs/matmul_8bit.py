"""8-bit codes of a weight that can be multiplied without decoding it (library/memory/products_8bit.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
MULTIPLES = {torch.int8: 8, FP8: 16, torch.float8_e5m2: 16}
"""Code dtypes that can be multiplied, each with the number of which both sizes of a weight must be multiples on
GPUs."""


@dataclass(frozen=True)
class Codes:
    """A weight stored as `rotation(codes * scales)`; `rotation` is its own inverse and its own transpose."""

    codes_OI: Tensor
    scales: Tensor  # () or (O, 1)
    rotation: Callable[[Tensor], Tensor] | None = None

    @property
    def can_be_multiplied(self) -> bool:
        """True if the kernels accept codes of this dtype and shape."""
        multiple = MULTIPLES.get(self.codes_OI.dtype)
        return (
            multiple is not None and self.scales.ndim < 3 and not any(size % multiple for size in self.codes_OI.shape)
        )

    @property
    def scales_of_outputs(self) -> Tensor:
        """The scales as () or (1, O), float32."""
        return self.scales.float() if self.scales.ndim == 0 else self.scales.float().reshape(1, -1)
