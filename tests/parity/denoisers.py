"""Common parts of the parity tests of our own denoisers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.blocks import recompute, run_blocks_with
from tests.unit.networks.toy import randomize


def save_trained(
    door: Any, path: Path, arguments: Mapping[str, str], seen: nn.Module, predict: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights on `seen`; gives what `predict` says without and with it."""
    base = predict()
    network = door.create_network(1.0, 4, 2, None, [], seen, **arguments)
    randomize(network, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.3)
    network.apply_to([], seen, False, True)
    network.eval()
    network.save_weights(str(path), None, {})
    return base, predict()


def assert_recomputing_changes_no_gradient(model: Any, inputs: Callable[[], Sequence[Tensor]]) -> None:
    """The gradient of the first of fresh `inputs` is the same, bit for bit, once blocks are computed twice."""
    gradients = []
    for _ in range(2):
        values = inputs()
        gradients.append(torch.autograd.grad(model(*values).square().sum(), values[0])[0])
        run_blocks_with(model, recompute)
    assert torch.equal(*gradients)
