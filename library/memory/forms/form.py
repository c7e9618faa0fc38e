"""What a stored form of a frozen weight must offer.

Letters: O outputs, I inputs of a weight as a matrix; the inputs of a convolution are its channels times its kernel.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
"""The tensors in which a weight is stored, by the names that they have on their layer."""


class Form(Protocol):
    """A codec: how one weight is stored, and how it becomes numbers to compute with again."""

    def encode(self, weight: Tensor) -> Parts:
        """The parts of a weight, (O, I) or (O, channels, height, width), on its device."""
        ...

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight of that shape in `dtype`, rounded as the form rounds it; possibly the stored tensor itself."""
        ...
