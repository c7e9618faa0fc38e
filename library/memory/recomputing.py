"""Activations that are computed again in the backward pass instead of kept (Chen et al. 2016)."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(recomputes: bool, block: nn.Module, *inputs: Any) -> Any:
    """What `block` gives; with `recomputes` only its inputs are kept for the gradient."""
    if recomputes and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
