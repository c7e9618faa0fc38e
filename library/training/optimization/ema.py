"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError


class WeightAverage:
    """Tracks the weights in float32 on their device: average = decay * average + (1 - decay) * weights.

    With n updates after `update_after_step`, the decay rises as (1 + n) / (10 + n) to its final value and is 0 before,
    as in diffusers' EMAModel, so that early weights count little.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, update_after_step: int) -> None:
        self.decay = decay
        self.update_after_step = update_after_step
        self.num_updates = 0
        self.parameters = list(parameters)
        self.values: list[Tensor] = []  # empty before the first update

    @property
    def next_decay(self) -> float:
        """The decay of the next update."""
        n = self.num_updates - self.update_after_step
        return 0.0 if n <= 0 else min((1 + n) / (10 + n), self.decay)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step."""
        # bf16 has too few bits for an average: updates of (1 - decay) times a difference would be lost to rounding.
        weights = [parameter.detach().float() for parameter in self.parameters]
        if not self.values:
            self.values = [weight.clone() for weight in weights]
        else:
            torch._foreach_lerp_(self.values, weights, 1 - self.next_decay)
        self.num_updates += 1

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Swap in the average inside the block; the weights are restored bit for bit."""
        if not self.values:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._put(self.values)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict. Raises UserError for another adapter's average."""
        values = state_dict["values"]
        shapes = [tuple(parameter.shape) for parameter in self.parameters]
        if values and [tuple(value.shape) for value in values] != shapes:
            raise UserError("it is the average of other weights", "give the network options that it was trained with")
        self.num_updates = state_dict["num_updates"]
        # No values are saved before the first update, hence not strict.
        self.values = [v.to(p.device, torch.float32) for v, p in zip(values, self.parameters, strict=False)]
