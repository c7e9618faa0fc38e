"""How a change meets the base weight."""

from typing import Protocol

from torch import Tensor


class Join(Protocol):
    """The rule that makes one weight out of the base weight and its change."""

    def merge(self, base: Tensor, change: Tensor) -> Tensor:
        """The weight that computes what base and change compute together."""
        ...


class Add:
    """W = W0 + dW."""

    def merge(self, base: Tensor, change: Tensor) -> Tensor:
        return base + change
