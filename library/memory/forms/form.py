"""What a stored form of a frozen weight must offer. Letters: O output features, I input features."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
"""The tensors in which a weight is stored, by the names that they have on their layer."""


class Form(Protocol):
    """A codec: how one weight is stored, and how it becomes numbers to compute with again."""

    def encode(self, weight_OI: Tensor) -> Parts:
        """The parts of a weight, on its device."""
        ...

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`, rounded as the form rounds it; possibly the stored tensor itself."""
        ...

    def dtype(self, parts: Parts) -> torch.dtype:
        """What the weight's dtype was before it was stored."""
        ...
