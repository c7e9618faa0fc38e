"""Where the inputs wait from which blocks are computed again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.blocks import recompute

Waiting = tuple[Tensor, torch.device | None]
"""A tensor, and the device that it is to come back to; None where it never left."""


def recompute_from_main_memory(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Run a block again in the backward pass, from inputs that wait in main memory until then.

    Only inputs that carry a gradient move: they are the block's own, while what is frozen, such as positions and masks,
    is shared by all blocks and would be copied once for each.
    """
    if not torch.is_grad_enabled():
        return block(*inputs, **named)
    own = {id(value) for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.requires_grad}
    places = {place_of(value) for value in (*inputs, *named.values()) if id(value) in own}

    def pack(tensor: Tensor) -> Waiting:
        return to_main_memory(tensor) if place_of(tensor) in places else (tensor, None)

    with saved_tensors_hooks(pack, bring_back):
        return recompute(block, *inputs, **named)


def place_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """What tells the values of one tensor from another's: autograd hands out aliases."""
    return tensor.data_ptr(), tensor.shape


def to_main_memory(tensor: Tensor) -> Waiting:
    """A copy in main memory, pinned where there is a card: the host goes on while it is made.

    The card frees and computes in the order of its stream, so the tensor may be dropped before the copy is done, and
    whatever reads the copy by the same stream comes after it.
    """
    on_card = tensor.device.type == "cuda"
    waiting = torch.empty_like(tensor, device="cpu", pin_memory=on_card)
    return waiting.copy_(tensor, non_blocking=on_card), tensor.device


def bring_back(waiting: Waiting) -> Tensor:
    tensor, device = waiting
    return tensor if device is None else tensor.to(device, non_blocking=True)
