"""Number formats and devices, and giving memory back between the stages of a run."""

import gc

import torch
from torch import nn

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision


def release_memory(keep_cache: bool = False) -> None:
    """Collect what is unreferenced; `keep_cache` (--highvram) leaves the card's cached blocks with torch."""
    gc.collect()
    if keep_cache:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a frozen model to `device`, convolution weights channels last, which CPUs and tensor cores prefer.

    A model with convolutions over frames keeps its layout: torch's switch knows one number of dimensions at a time.
    """
    moved = module.to(device)
    if all(weight.ndim <= 4 for weight in moved.parameters()):
        moved = moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved
