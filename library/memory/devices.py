"""Dtypes, devices, and the release of memory between the stages of a run."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.pinned import pin_if_possible
from library.memory.small_convolutions import use_matmul_convolutions

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision
SAVE_DTYPES = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtypes by the value of --save_precision."""


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of modules, each shared one once."""
    return list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())


def bytes_of(*modules: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of modules. Shared ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(*modules))


def release_memory(keep_cache: bool = False) -> None:
    """Collect garbage and free torch's cached GPU memory. `keep_cache` (--highvram) keeps the cache."""
    # Tensors in reference cycles would keep their memory from being returned to the driver.
    gc.collect()
    if keep_cache:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`, without blocking the host until earlier work of the device is done."""
    # A plain copy blocks the host until the GPU reaches it, and so does every copy of unpinned memory. torch reuses the
    # memory pinned here once the copy is done.
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = pin_if_possible(tensor)
    return tensor.to(device, non_blocking=device.type in ("cuda", "cpu"))  # other devices may read freed memory


def is_on(tensor: Tensor, device: torch.device) -> bool:
    """Return True if a tensor is on `device`; a device without an index, such as `cuda`, matches every index."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def channels_last_where_it_fits(weights: Iterable[Tensor]) -> torch.memory_format:
    """Return the memory format for convolution weights: channels last, faster on CPUs and tensor cores, if possible."""
    # A model with convolutions over frames keeps its layout: `Module.to(memory_format=...)` supports one number of
    # dimensions.
    return torch.channels_last if all(weight.ndim <= 4 for weight in weights) else torch.contiguous_format


def move_to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a frozen model to `device`, in channels-last format if possible.

    On the CPU also protect its group norms, and let small convolutions use a matrix product.
    """
    moved = module.to(device)
    layout = channels_last_where_it_fits(moved.parameters())
    if layout == torch.channels_last:
        moved = moved.to(memory_format=layout)  # type: ignore[call-overload]
        if device.type == "cpu":
            protect_group_norms(moved)
            use_matmul_convolutions(moved)
    return moved


def protect_group_norms(module: nn.Module) -> None:
    """Protect a model's group norms from a crash in torch's backward pass on the CPU, see `make_input_contiguous`."""
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm) and make_input_contiguous not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(make_input_contiguous)


def make_input_contiguous(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make the input of a group norm contiguous if it needs no gradient."""
    # On the CPU torch 2.13 crashes with a segmentation fault in the backward pass of a group norm whose weight has a
    # gradient and whose channels-last input has none. Only inputs before the first adapter have none.
    x, *rest = inputs
    if not torch.is_grad_enabled() or x.requires_grad or x.device.type != "cpu" or x.is_contiguous():
        return None
    return (x.contiguous(), *rest)
