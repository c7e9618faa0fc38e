"""Which attention the diffusers models run."""

import logging
from typing import Any

from torch import nn

from library.options.machine.memory import MemoryOptions

logger = logging.getLogger(__name__)


def wants_xformers(memory: MemoryOptions) -> bool:
    """Whether attention runs in xformers; torch's scaled dot product attention is used otherwise.

    It computes the same, so it also stands in for a missing xformers, with a warning: front ends ask for that by
    default.
    """
    from importlib.util import find_spec

    if memory.mem_eff_attn:
        logger.info("--mem_eff_attn: torch's scaled dot product attention (sdpa) is used, which needs as little memory")
        return False
    if memory.xformers and find_spec("xformers") is None:
        logger.warning(
            "--xformers: the package xformers is not installed; torch's scaled dot product attention (sdpa) is used, "
            "which computes the same in as little memory"
        )
        return False
    return memory.xformers


def with_attention(model: Any, uses_xformers: bool) -> nn.Module:
    """The diffusers model with its attention set; torch's scaled dot product attention is what it comes with."""
    if uses_xformers:
        model.enable_xformers_memory_efficient_attention()
    module: nn.Module = model
    return module
