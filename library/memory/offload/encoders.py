"""Text encoders larger than the GPU: their layers are kept in main memory and streamed to the device one by one."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from library.base.formatting import format_bytes
from library.memory.blocks import encoder_layers
from library.memory.codecs.plain import Plain
from library.memory.devices import bytes_of
from library.memory.frozen import can_be_frozen, freeze_layers
from library.memory.offload.ring import NUM_SLOTS
from library.memory.offload.streamed import stream

logger = logging.getLogger(__name__)

MARGIN_BYTES = 1 << 30  # activations of a few captions, rounding by the allocator, cuBLAS workspaces


def count_streamed_bytes(encoder: nn.Module) -> int:
    """Return an encoder's bytes on the device with streamed layers: the rest, the last layer and two slots."""
    layers = [layer_bytes(layer) for layer in encoder_layers(encoder)]
    if len(layers) < 2:
        return bytes_of(encoder)
    return bytes_of(encoder) - sum(layers[:-1]) + NUM_SLOTS * max(layers[:-1])


def least_bytes(encoders: Sequence[nn.Module]) -> int:
    """Return the bytes of all encoders on the device while the layers of each are streamed."""
    return sum(map(count_streamed_bytes, encoders))


def layer_bytes(layer: nn.Module) -> int:
    """Return the bytes of the weight matrices of a layer. Norms and biases always stay on the device."""
    weights = [module.weight for module in layer.modules() if can_be_frozen(module)]
    return sum(weight.numel() * weight.element_size() for weight in weights if isinstance(weight, torch.Tensor))


def place_encoders(encoders: Sequence[nn.Module], device: torch.device, free_bytes: int | None = None) -> None:
    """Move frozen text encoders to a device. If they do not fit together, stream the layers of the largest ones.

    Outputs are the same bit for bit. `free_bytes` is the memory that the encoders may use; None queries the driver. On
    devices other than CUDA all encoders are moved.
    """
    if free_bytes is None and device.type == "cuda":
        # The driver counts memory that torch has cached as used, but the encoders can have it.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free_bytes = torch.cuda.mem_get_info(device)[0] + unused
    sizes = [bytes_of(encoder) for encoder in encoders]
    total = sum(sizes)
    for size, encoder in sorted(zip(sizes, encoders, strict=True), key=lambda pair: pair[0], reverse=True):
        if free_bytes is None or total + MARGIN_BYTES <= free_bytes:
            break
        streamed_size = count_streamed_bytes(encoder)
        if streamed_size >= size:  # with few layers, two slots take as much
            continue
        total += streamed_size - size
        logger.info(
            "%s (%s) does not fit the GPU beside the others: its layers are streamed from main memory, %s at a time",
            type(encoder).__name__,
            format_bytes(size),
            format_bytes(streamed_size),
        )
        stream_layers(encoder, device)
    for encoder in encoders:
        # For a streamed encoder this moves the rest: embeddings, norms, biases and the last layer.
        encoder.to(device)


def stream_layers(encoder: nn.Module, device: torch.device) -> None:
    """Offload all layers of a frozen encoder but the last to main memory, and stream their weights through slots."""
    layers = encoder_layers(encoder)
    # Only frozen layers fetch their weight through a handle. Plain storage changes no bit.
    freeze_layers(Plain(), (module for layer in layers for module in layer.modules()))
    stream([layers], [len(layers) - 1], device)
