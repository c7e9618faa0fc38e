"""Text encoders larger than the GPU: their layers wait in main memory and come one after the other."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from library.formatting import format_bytes
from library.memory.blocks import encoder_layers
from library.memory.codecs.plain import Plain
from library.memory.devices import bytes_of
from library.memory.frozen import can_be_frozen, store_all_in
from library.memory.offload.ring import NUM_SLOTS
from library.memory.offload.streamed import stream

logger = logging.getLogger(__name__)

MARGIN_BYTES = 1 << 30  # activations of a few captions, the allocator's rounding, workspaces of cuBLAS


def streamed_bytes(encoder: nn.Module) -> int:
    """Return what an encoder takes on the device while its layers are streamed: the rest, one layer and two slots."""
    layers = [layer_bytes(layer) for layer in encoder_layers(encoder)]
    if len(layers) < 2:
        return bytes_of(encoder)
    return bytes_of(encoder) - sum(layers[:-1]) + NUM_SLOTS * max(layers[:-1])


def least_bytes(encoders: Sequence[nn.Module]) -> int:
    """Return what encoders take together on the device with the layers of all of them streamed."""
    return sum(map(streamed_bytes, encoders))


def layer_bytes(layer: nn.Module) -> int:
    """Return what the matrices of a layer take; norms and biases always stay on the device."""
    weights = [module.weight for module in layer.modules() if can_be_frozen(module)]
    return sum(weight.numel() * weight.element_size() for weight in weights if isinstance(weight, torch.Tensor))


def place_encoders(encoders: Sequence[nn.Module], device: torch.device, free_bytes: int | None = None) -> None:
    """Move frozen text encoders to a device, and stream the layers of the largest ones if all together do not fit.

    What they compute is the same bit for bit. `free_bytes` is the memory that they may take; None asks the driver, and
    devices other than CUDA take everything.
    """
    if free_bytes is None and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free_bytes = torch.cuda.mem_get_info(device)[0] + unused
    sizes = [bytes_of(encoder) for encoder in encoders]
    total = sum(sizes)
    for size, encoder in sorted(zip(sizes, encoders, strict=True), key=lambda pair: pair[0], reverse=True):
        if free_bytes is None or total + MARGIN_BYTES <= free_bytes:
            break
        least = streamed_bytes(encoder)
        if least >= size:  # a few layers: slots for two would take as much
            continue
        total += least - size
        logger.info(
            "%s (%s) does not fit the GPU beside the others: its layers are streamed from main memory, %s at a time",
            type(encoder).__name__,
            format_bytes(size),
            format_bytes(least),
        )
        stream_layers(encoder, device)
    for encoder in encoders:
        encoder.to(device)


def stream_layers(encoder: nn.Module, device: torch.device) -> None:
    """Let all layers of a frozen encoder but the last wait in main memory, and give their weights through slots."""
    layers = encoder_layers(encoder)
    store_all_in(Plain(), (module for layer in layers for module in layer.modules()))
    stream([layers], [len(layers) - 1], device)
