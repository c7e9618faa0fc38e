"""Names of the denoiser's weights in the original layout, which is ours, and in diffusers'.

A weight of ours stacks several of diffusers'; `sources` lists them.
"""

import re
from collections.abc import Iterable, Mapping

from library.checkpoints.fused_tensors import joined
from library.checkpoints.weights import Weights
from library.models.double_stream_keys import SWAPPED, StreamKeys, leaf_names

DIFFUSERS_MARK = "x_embedder.weight"
APPROXIMATOR = "distilled_guidance_layer."  # of Chroma; diffusers uses these names except for two parts
APPROXIMATOR_PARTS = {"in_layer": "linear_1", "out_layer": "linear_2"}

TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: Mapping[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
KEYS = StreamKeys(TOP, DOUBLE, SINGLE)


def sources(path: str) -> tuple[str, ...]:
    """Return diffusers' paths of the layers that make up one of ours; raises KeyError for other paths."""
    if path.startswith(APPROXIMATOR):
        stem, _, part = path.rpartition(".")
        return (f"{stem}.{APPROXIMATOR_PARTS.get(part, part)}",)
    return KEYS.sources(path)


def source_keys(key: str) -> tuple[str, ...]:
    """Return diffusers' names of the weights that make up one of ours."""
    path, _, leaf = key.rpartition(".")
    return leaf_names(sources(path), leaf)


def our_keys(names: Iterable[str]) -> list[str]:
    """Return our names of the weights of a model in diffusers' layout."""
    names = list(names)
    return [*KEYS.our_keys(names), *(our_approximator_key(name) for name in names if name.startswith(APPROXIMATOR))]


def our_approximator_key(name: str) -> str:
    """Return our name of an approximator's weight in diffusers' layout."""
    for ours, theirs in APPROXIMATOR_PARTS.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return re.sub(r"(\.norms\.\d+)\.weight$", r"\1.scale", name)


def from_diffusers(weights: Weights) -> Weights:
    """Rename a model in diffusers' layout to our names, joining each tensor when it is read.

    Raises UserError naming missing parts of an incomplete layer.
    """
    return joined(weights, {key: source_keys(key) for key in our_keys(weights.shapes)}, f"{SWAPPED}.")
