"""Frozen weights stored as plain numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.codecs.codec import Parts


@dataclass(frozen=True)
class Plain:
    """Storage in one part, `values`, in the weight's shape and memory format. `dtype` None keeps the weight's dtype."""

    dtype: torch.dtype | None = None

    def encode(self, weight: Tensor) -> Parts:
        return {"values": weight.detach().to(self.dtype or weight.dtype)}

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts["values"].to(dtype)

    def codes(self, parts: Parts) -> None:
        return None
