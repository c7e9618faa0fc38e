"""The form that stores a frozen weight as it is."""

import torch
from torch import Tensor

from library.memory.forms.form import Parts


class Plain:
    """One part, `values` (O, I), in the dtype that the weight had."""

    def encode(self, weight_OI: Tensor) -> Parts:
        return {"values": weight_OI}

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return parts["values"].to(dtype)

    def dtype(self, parts: Parts) -> torch.dtype:
        return parts["values"].dtype
