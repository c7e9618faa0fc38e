"""How a frozen weight is turned into stored tensors and back: the protocols, and what a loader can be asked for.

Letters: O outputs, I inputs of a weight as a matrix; the inputs of a convolution are its channels times its kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from library.memory.codecs.matmul_8bit import Codes

Parts = Mapping[str, Tensor]
"""The tensors in which a weight is stored, by the names that they have on their layer."""


class Decoder(Protocol):
    """How a stored weight becomes numbers to compute with again."""

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight of that shape in `dtype`, rounded as storing rounded it; possibly the stored tensor itself."""
        ...

    def codes(self, parts: Parts) -> Codes | None:
        """The 8-bit codes that can be multiplied without decoding them; None if the weight is stored in another way."""
        ...


class Codec(Decoder, Protocol):
    """How one weight is stored, too."""

    def encode(self, weight: Tensor) -> Parts:
        """The parts of a weight, (O, I) or (O, channels, height, width), on its device."""
        ...


class AsInFile:
    """Asks for weights as their file has them: 8-bit ones stay so, others are read as numbers."""


AS_IN_FILE = AsInFile()


@dataclass(frozen=True)
class AsRead:
    """Says what else becomes of each weight as soon as it is read: so the model is never whole, nor there twice."""

    codec: Codec | AsInFile | None
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)  # by name, before it is stored
    take: Callable[[nn.Module], None] | None = None  # takes a layer away whose weight is stored


RequestedFormat = Codec | AsInFile | AsRead
"""What weights are to be stored in while they are read."""
