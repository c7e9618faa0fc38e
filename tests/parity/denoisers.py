"""Helpers for the parity tests of our own denoisers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.blocks import recompute, run_blocks_with
from tests.unit.networks.toy import randomize


def save_trained(
    network_module: Any, path: Path, arguments: Mapping[str, str], view: nn.Module, predict: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights on `view`; return the predictions without and with it."""
    base = predict()
    network = network_module.create_network(1.0, 4, 2, None, [], view, **arguments)
    randomize(network, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.3)
    network.apply_to([], view, False, True)
    network.eval()
    network.save_weights(str(path), None, {})
    return base, predict()


def assert_checkpointing_keeps_gradients(model: Any, inputs: Callable[[], Sequence[Tensor]]) -> None:
    """Assert that gradient checkpointing leaves the gradient of the first input unchanged, bit for bit."""
    gradients = []
    for _ in range(2):
        values = inputs()
        gradients.append(torch.autograd.grad(model(*values).square().sum(), values[0])[0])
        run_blocks_with(model, recompute)
    assert torch.equal(*gradients)
