"""Number formats and devices, and giving memory back between the stages of a run."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.small_convolutions import quicken

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision
SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --save_precision


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of modules, shared ones once."""
    return list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())


def bytes_of(*modules: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of modules, shared ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(*modules))


def release_memory(keep_cache: bool = False) -> None:
    """Collect what is unreferenced; `keep_cache` (--highvram) leaves the card's cached blocks with torch."""
    gc.collect()
    if keep_cache:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`, from wherever it is; the host goes on without waiting for what the device is doing.

    torch's plain copy lets the host wait until a card has come to it, and so does every copy of memory that is not
    pinned. The memory that is pinned here is used again once the copy is done: torch sees to it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type in ("cuda", "cpu"))  # others may read memory that is gone by then


def is_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device, which may leave its number open, as `cuda` does."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def channels_last_where_it_fits(weights: Iterable[Tensor]) -> torch.memory_format:
    """The layout of a model's convolution weights: channels last, which CPUs and tensor cores prefer.

    A model with convolutions over frames keeps its layout: torch's switch knows one number of dimensions at a time.
    """
    return torch.channels_last if all(weight.ndim <= 4 for weight in weights) else torch.contiguous_format


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a frozen model to `device`, with the layout that suits it."""
    moved = module.to(device)
    layout = channels_last_where_it_fits(moved.parameters())
    if layout == torch.channels_last:
        moved = moved.to(memory_format=layout)  # type: ignore[call-overload]
        if device.type == "cpu":
            protect_group_norms(moved)
            quicken(moved)
    return moved


def protect_group_norms(module: nn.Module) -> None:
    """Give group norms an input that torch's backward pass survives, whoever trains them and in whatever way."""
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm) and survivable not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(survivable)


def survivable(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The input of a group norm in torch's usual layout where its own gradient is not asked for.

    On the CPU torch 2.13 ends the process with a segmentation fault in the backward pass of a group norm whose input is
    channels last and has no gradient while its weight has one. Only what comes before the first adapter is such an
    input.
    """
    x, *rest = inputs
    if not torch.is_grad_enabled() or x.requires_grad or x.device.type != "cpu" or x.is_contiguous():
        return None
    return (x.contiguous(), *rest)
