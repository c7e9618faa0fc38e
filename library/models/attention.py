"""The attention kernel of diffusers models."""

import logging
from typing import Any

from torch import nn

from library.options.machine.memory import MemoryOptions

logger = logging.getLogger(__name__)


def should_use_xformers(memory: MemoryOptions) -> bool:
    """Return True if attention runs in xformers instead of torch's scaled dot product attention."""
    # Both compute the same, so torch's also replaces a missing xformers, with a warning: front ends request xformers by
    # default.
    from importlib.util import find_spec

    if memory.mem_eff_attn:
        logger.info("--mem_eff_attn: using torch's scaled dot product attention (sdpa), which needs as little memory")
        return False
    if memory.xformers and find_spec("xformers") is None:
        logger.warning(
            "--xformers: the package xformers is not installed; using torch's scaled dot product attention (sdpa), "
            "which computes the same in as little memory"
        )
        return False
    return memory.xformers


def with_attention(model: Any, uses_xformers: bool) -> nn.Module:
    """Set the attention of a diffusers model; the default is torch's scaled dot product attention."""
    if uses_xformers:
        model.enable_xformers_memory_efficient_attention()
    module: nn.Module = model
    return module
