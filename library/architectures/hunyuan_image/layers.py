"""The layers of HunyuanImage 2.1: their names in the original layout, in ours, which is ComfyUI's, in diffusers' and in
adapter files, and what adapters target.

ComfyUI's model has FLUX.1's names in the blocks. It ignores adapters under the original names without an error.
"""

from collections.abc import Mapping

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.double_stream import DOUBLE_GELU, SINGLE, SWAPPED
from library.models.layer_keys import LayerKeys, Layers, Stack, name_layer, underscore
from networks.core.targets.targets import AdapterTargets, Part, qkv_and_rest, thirds

DIFFUSERS_MARK = "x_embedder.proj.weight"
TIME, TEXT = "time_guidance_embed.timestep_embedder", "context_embedder"

TOP: Mapping[str, str] = {
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": f"{TEXT}.proj_in",
    "txt_in.t_embedder.mlp.0": f"{TEXT}.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": f"{TEXT}.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": f"{TEXT}.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": f"{TEXT}.time_text_embed.text_embedder.linear_2",
    "time_in.mlp.0": f"{TIME}.linear_1",
    "time_in.mlp.2": f"{TIME}.linear_2",
    "time_r_in.mlp.0": f"{TIME}_r.linear_1",  # only in distilled models, like the next
    "time_r_in.mlp.2": f"{TIME}_r.linear_2",
    "guidance_in.mlp.0": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    SWAPPED: "norm_out.linear",
}
REFINER: Layers = {
    "norm1": ("norm1",),
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "norm2": ("norm2",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
RENAMED: Mapping[str, str] = {  # parts of names in the blocks of the original layout -> ours, which are FLUX.1's
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
    "_mlp.fc1": "_mlp.0",
    "_mlp.fc2": "_mlp.2",
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "_attn_q_norm": "_attn.norm.query_norm",
    "_attn_k_norm": "_attn.norm.key_norm",
    ".q_norm": ".norm.query_norm",
    ".k_norm": ".norm.key_norm",
}
BLOCKS = ("double_blocks.", "single_blocks.")


def from_original(name: str) -> str:
    """Return our name of a weight or layer from its name in the original layout."""
    if not name.startswith(BLOCKS):
        return name.replace("img_in.proj.", "img_in.")
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name.replace("_norm.weight", "_norm.scale")


def to_original(name: str) -> str:
    """Invert `from_original`."""
    if not name.startswith(BLOCKS):
        return name.replace("img_in.", "img_in.proj.")
    for theirs, ours in RENAMED.items():
        name = name.replace(ours, theirs)
    return name.replace("_norm.scale", "_norm.weight")


def original_layers(stack: str, layers: Layers) -> Layers:
    """Return the layers of FLUX.1's blocks under their original names."""
    return {to_original(f"{stack}.{name}").removeprefix(f"{stack}."): theirs for name, theirs in layers.items()}


KEYS = LayerKeys(
    TOP,
    (
        Stack("txt_in.individual_token_refiner.blocks", f"{TEXT}.token_refiner.refiner_blocks", REFINER),
        Stack("double_blocks", "transformer_blocks", original_layers("double_blocks", DOUBLE_GELU)),
        Stack("single_blocks", "single_transformer_blocks", original_layers("single_blocks", SINGLE)),
    ),
    SWAPPED,
)
NUM_BLOCKS = {"double_blocks": 20, "single_blocks": 40}
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model


def is_target(path: str) -> bool:
    """Return True for the original path of a layer that adapters target: the Linear layers of the blocks."""
    return path.startswith(BLOCKS) and KEYS.is_linear(path)


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer by its original path, which sd-scripts uses; our files use the names of ComfyUI's model."""
    original_name, comfy_path = underscore(path), from_original(path)
    shares = LINEAR1_SHARES if path.endswith(".linear1") else ()
    aliases = (original_name,) if original_name != underscore(comfy_path) else ()
    return name_layer(comfy_path, KEYS.sources(path), shares=shares, aliases=aliases)


PATHS = filter(is_target, KEYS.linear_paths(NUM_BLOCKS))
NAMES = BaseNames("hunyuan_image", tuple(map(denoiser_module, PATHS)))


TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("MMDoubleStreamBlock", "MMSingleStreamBlock")),
    fused={r"_attn\.qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
    elsewhere=list_network_arguments,
)
