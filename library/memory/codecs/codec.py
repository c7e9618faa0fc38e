"""Codecs between frozen weights and their stored tensors: protocols, and the requests that a loader accepts.

Letters: O outputs, I inputs of a weight as a matrix; the inputs of a convolution are its channels times its kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from library.memory.codecs.matmul_8bit import Codes

Parts = Mapping[str, Tensor]
"""The tensors that store a weight, by their names on the layer."""


class Decoder(Protocol):
    """The decoding half of a codec."""

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Decode the weight to this shape and dtype. The result can be the stored tensor itself."""
        ...

    def codes(self, parts: Parts) -> Codes | None:
        """Return the 8-bit codes for products without decoding, or None if the weight is not stored in this way."""
        ...


class Codec(Decoder, Protocol):
    """A decoder that can also encode."""

    def encode(self, weight: Tensor) -> Parts:
        """Return the parts of a weight, (O, I) or (O, channels, height, width), on the weight's device."""
        ...


class AsInFile:
    """Request to keep weights as their file stores them: 8-bit weights stay quantised, others are read as numbers."""


AS_IN_FILE = AsInFile()


@dataclass(frozen=True)
class AsRead:
    """Request to transform and store each weight as it is read, so that the original model is never whole in memory."""

    codec: Codec | AsInFile | None
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)  # by weight name, before storing
    shard: Callable[[nn.Module], None] | None = None  # keeps this process's part of a stored layer


RequestedFormat = Codec | AsInFile | AsRead
"""The format in which weights are stored while they are read."""
