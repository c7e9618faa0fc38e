"""Recomputation from block inputs that are kept in main memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.blocks import recompute

Waiting = tuple[Tensor, torch.device | None]
"""A saved tensor and the device to return it to; None if it never left its device."""


def recompute_from_main_memory(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Run a block again in the backward pass, from inputs kept in main memory until then."""
    # Only inputs that carry a gradient are moved: frozen ones, such as positions and masks, are shared by all blocks
    # and would be copied once per block.
    if not torch.is_grad_enabled():
        return block(*inputs, **named)
    own = {id(value) for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.requires_grad}
    places = {place_of(value) for value in (*inputs, *named.values()) if id(value) in own}

    def pack(tensor: Tensor) -> Waiting:
        return to_main_memory(tensor) if place_of(tensor) in places else (tensor, None)

    with saved_tensors_hooks(pack, bring_back):
        return recompute(block, *inputs, **named)


def place_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """Identify the values of a tensor: autograd hands out aliases, which are different objects."""
    return tensor.data_ptr(), tensor.shape


def to_main_memory(tensor: Tensor) -> Waiting:
    """Copy a tensor to main memory without blocking the host if it is on a GPU."""
    # The GPU frees and computes in stream order, so the tensor may be dropped before the copy is done, and everything
    # that reads the copy on the same stream runs after it.
    on_card = tensor.device.type == "cuda"
    waiting = torch.empty_like(tensor, device="cpu", pin_memory=on_card)
    return waiting.copy_(tensor, non_blocking=on_card), tensor.device


def bring_back(waiting: Waiting) -> Tensor:
    tensor, device = waiting
    return tensor if device is None else tensor.to(device, non_blocking=True)
