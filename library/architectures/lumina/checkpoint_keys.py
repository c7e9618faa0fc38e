"""Names of the denoiser's weights in the original layout, which is ours, and in diffusers'.

A weight of ours stacks several of diffusers'; `sources` lists them.
"""

from collections.abc import Iterator, Mapping

from library.checkpoints.fused_tensors import joined
from library.checkpoints.weights import Weights

STACKS = ("context_refiner", "noise_refiner", "layers")
DIFFUSERS_MARK = "time_caption_embed.caption_embedder.1.weight"

TOP = {
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
BLOCK: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "attention_norm1": ("norm1.norm",),
    "ffn_norm1": ("ffn_norm1",),
    "attention_norm2": ("norm2",),
    "ffn_norm2": ("ffn_norm2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
UNMODULATED = {**BLOCK, "attention_norm1": ("norm1",)}  # where diffusers has a plain norm


def sources(path: str) -> tuple[str, ...]:
    """Return diffusers' paths of the layers that make up one of ours; raises KeyError for other paths."""
    stack, _, rest = path.partition(".")
    if stack not in STACKS:
        return (TOP[path],)
    number, _, layer = rest.partition(".")
    names = (UNMODULATED if stack == "context_refiner" else BLOCK)[layer]
    return tuple(f"{stack}.{number}.{name}" for name in names)


def source_keys(key: str) -> tuple[str, ...]:
    """Return diffusers' names of the weights that make up one of ours."""
    path, _, leaf = key.rpartition(".")
    return tuple(f"{name}.{leaf}" for name in sources(path))


def candidates(names: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield our names of the weights that a model in diffusers' layout may have."""
    paths = list(TOP)
    for stack in STACKS:
        numbers = sorted({int(name.split(".")[1]) for name in names if name.startswith(f"{stack}.")})
        paths += [f"{stack}.{number}.{layer}" for number in numbers for layer in BLOCK]
    yield from (f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias"))


def from_diffusers(weights: Weights) -> Weights:
    """Rename a model in diffusers' layout to our names, joining each tensor when it is read.

    Raises UserError naming missing parts of an incomplete layer.
    """
    return joined(weights, {key: source_keys(key) for key in candidates(weights.shapes)})
