"""Names of the denoiser's layers, which diffusers' and ComfyUI's files share."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from library.checkpoints.weights import Quantised, Weights

BLOCKS = "transformer_blocks"
TOP = (
    "img_in", "txt_in.in_layer", "txt_in.out_layer", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2", "modulation.1", "norm_out.linear", "proj_out",
)  # fmt: skip
FUSED, PARTS = "img_mlp.gate_up", ("img_mlp.gate_layer", "img_mlp.proj")  # stacked rows in some of ComfyUI's files
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *PARTS, "img_mlp.out")


def is_linear(path: str) -> bool:
    """Return True for the path of a Linear layer, including the fused one of ComfyUI's files."""
    if path.startswith(f"{BLOCKS}."):
        return path.split(".", 2)[-1] in (*LAYERS, FUSED)
    return path in TOP


def linear_paths(num_blocks: int) -> Iterator[str]:
    """Yield the path of every Linear layer for `num_blocks` blocks."""
    yield from TOP
    yield from (f"{BLOCKS}.{number}.{layer}" for number in range(num_blocks) for layer in LAYERS)


def split_gates(weights: Weights) -> Weights:
    """Split the layers that ComfyUI's files fuse, when they are read; 8-bit codes stay as stored."""
    fused = [key for key in weights.shapes if f".{FUSED}." in key]
    halves = {key.replace(FUSED, part): (key, half) for key in fused for half, part in enumerate(PARTS)}
    if not fused:
        return weights
    kept = {key: shape for key, shape in weights.shapes.items() if key not in fused}
    shapes = {new_key: (weights.shapes[key][0] // 2, *weights.shapes[key][1:]) for new_key, (key, _) in halves.items()}

    def read(name: str) -> Tensor:
        if name not in halves:
            return weights.read(name)
        key, half = halves[name]
        # A copy, because a view would keep the other half in memory.
        return weights.read(key).chunk(2)[half].clone()

    quantised = {
        new_key: take_quantised_half(weights.quantised[k], i)
        for new_key, (k, i) in halves.items()
        if k in weights.quantised
    }
    kept_quantised = {name: codes for name, codes in weights.quantised.items() if name in kept}
    return replace(weights, shapes={**kept, **shapes}, read=read, quantised={**kept_quantised, **quantised})


def take_quantised_half(quantised: Quantised, half: int) -> Quantised:
    """Return one half of the rows of a quantised weight; a scale of the whole tensor applies to both halves."""

    def read() -> Mapping[str, Tensor] | None:
        parts = quantised.read()
        return parts if parts is None else {name: take_half(part, half) for name, part in parts.items()}

    return replace(quantised, read=read)


def take_half(part: Tensor, half: int) -> Tensor:
    return part if part.ndim == 0 else torch.chunk(part, 2)[half].clone()
