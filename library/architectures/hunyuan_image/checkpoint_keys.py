"""Names of the denoiser's weights in the original layout, which is ours, and in diffusers'.

A weight of ours stacks several of diffusers'; `sources` lists them.
"""

from collections.abc import Iterable, Mapping

from library.checkpoints.fused_tensors import joined
from library.checkpoints.weights import Weights

DIFFUSERS_MARK = "x_embedder.proj.weight"
SWAPPED = "final_layer.adaLN_modulation.1."  # diffusers has shift and scale in reverse order
TIME, TEXT = "time_guidance_embed.timestep_embedder", "context_embedder"

TOP: Mapping[str, tuple[str, ...]] = {
    "byt5_in.layernorm": ("context_embedder_2.norm",),
    "byt5_in.fc1": ("context_embedder_2.linear_1",),
    "byt5_in.fc2": ("context_embedder_2.linear_2",),
    "byt5_in.fc3": ("context_embedder_2.linear_3",),
    "img_in.proj": ("x_embedder.proj",),
    "txt_in.input_embedder": (f"{TEXT}.proj_in",),
    "txt_in.t_embedder.mlp.0": (f"{TEXT}.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": (f"{TEXT}.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": (f"{TEXT}.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": (f"{TEXT}.time_text_embed.text_embedder.linear_2",),
    "time_in.mlp.0": (f"{TIME}.linear_1",),
    "time_in.mlp.2": (f"{TIME}.linear_2",),
    "time_r_in.mlp.0": (f"{TIME}_r.linear_1",),  # in distilled models, like the next
    "time_r_in.mlp.2": (f"{TIME}_r.linear_2",),
    "guidance_in.mlp.0": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_guidance_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
REFINER: Mapping[str, tuple[str, ...]] = {
    "norm1": ("norm1",),
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "norm2": ("norm2",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_mod.linear": ("norm1.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_q_norm": ("attn.norm_q",),
    "img_attn_k_norm": ("attn.norm_k",),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mod.linear": ("norm1_context.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_q_norm": ("attn.norm_added_q",),
    "txt_attn_k_norm": ("attn.norm_added_k",),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "q_norm": ("attn.norm_q",),
    "k_norm": ("attn.norm_k",),
    "modulation.linear": ("norm.linear",),
}
STACKS = (
    ("txt_in.individual_token_refiner.blocks", f"{TEXT}.token_refiner.refiner_blocks", REFINER),
    ("double_blocks", "transformer_blocks", DOUBLE),
    ("single_blocks", "single_transformer_blocks", SINGLE),
)


def sources(path: str) -> tuple[str, ...]:
    """Return diffusers' paths of the layers that make up one of ours; raises KeyError for other paths."""
    for ours, theirs, layers in STACKS:
        if path.startswith(f"{ours}."):
            number, layer = path.removeprefix(f"{ours}.").split(".", 1)
            return tuple(f"{theirs}.{number}.{name}" for name in layers[layer])
    return TOP[path]


def source_keys(key: str) -> tuple[str, ...]:
    """Return diffusers' names of the weights that make up one of ours."""
    path, _, leaf = key.rpartition(".")
    return tuple(f"{name}.{leaf}" for name in sources(path))


def our_keys(names: Iterable[str]) -> list[str]:
    """Return our names of the weights of a model in diffusers' layout."""
    has = set(names)
    paths = list(TOP)
    for ours, theirs, layers in STACKS:
        numbers = sorted(
            {int(name.removeprefix(f"{theirs}.").split(".")[0]) for name in has if name.startswith(f"{theirs}.")}
        )
        paths += [f"{ours}.{number}.{layer}" for number in numbers for layer in layers]
    keys = [f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")]
    return [key for key in keys if any(source in has for source in source_keys(key))]


def from_diffusers(weights: Weights) -> Weights:
    """Rename a model in diffusers' layout to our names, joining each tensor when it is read.

    Raises UserError naming missing parts of an incomplete layer.
    """
    return joined(weights, {key: source_keys(key) for key in our_keys(weights.shapes)}, SWAPPED)
