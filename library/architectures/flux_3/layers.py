"""The layers of FLUX.3 Image Klein: their names in the original layout, which is ours, in diffusers' and in adapter
files (ComfyUI and ai-toolkit write the original ones, SimpleTuner diffusers'), and what adapters target."""

from collections.abc import Mapping

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames
from library.models.double_stream import is_scale, list_stream_leaves
from library.models.layer_keys import GENERIC_PREFIX, KOHYA_PREFIX, LayerKeys, Layers, Stack
from networks.core.targets.targets import AdapterTargets, Embedders, Part

IMAGES = ("image", "image_cond")  # modes of tokens: the noisy image, and reference images
TEXT = "txt"
MARK, DIFFUSERS_MARK = "early_stream_modulations.image.lin.weight", "context_embedder.weight"
MODULATIONS = ("early_stream_modulations", "single_stream_modulations")

TOP: Mapping[str, str] = {
    **{f"emb_in.{mode}": f"x_embedders.{mode}" for mode in IMAGES},
    "txt_in": "context_embedder",
    "time_in.in_layer": "timestep_embedder.linear_1",
    "time_in.out_layer": "timestep_embedder.linear_2",
    "ref_time_in.in_layer": "target_timestep_embedder.linear_1",
    "ref_time_in.out_layer": "target_timestep_embedder.linear_2",
    **{f"{stem}.{mode}.lin": f"{stem}.{mode}.linear" for stem in MODULATIONS for mode in (*IMAGES, TEXT)},
    "final_layer.image.linear": "proj_out",
    "final_layer.image.adaLN_modulation.1": "norm_out.linear",
}
BLOCK: Layers = {
    "q_proj": ("attn.to_q",),
    "k_proj": ("attn.to_k",),
    "v_proj": ("attn.to_v",),
    "attn_out": ("attn.to_out.0",),
    "mlp_in": ("ff.linear_in",),
    "mlp_out": ("ff.linear_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
KEYS = LayerKeys(
    TOP,
    (
        *(Stack(f"content_mode_blocks.{mode}", f"mode_blocks.{mode}", BLOCK) for mode in IMAGES),
        Stack("txt_mode_blocks", "txt_mode_blocks", BLOCK),
        Stack("single_blocks", "single_transformer_blocks", BLOCK),
    ),
    swapped="final_layer.image.adaLN_modulation.1",
    leaves=list_stream_leaves,
    is_other=is_scale,
    others=(GENERIC_PREFIX, KOHYA_PREFIX),
)
NUM_BLOCKS = {**{stack.ours: 5 for stack in KEYS.stacks}, "single_blocks": 28}
NAMES = BaseNames("flux_3", tuple(KEYS.list_names(NUM_BLOCKS)), saved_naming="generic")
TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("SingleStreamBlock",)),
    ranks={"attn_dim": r"\.(q_proj|k_proj|v_proj|attn_out)$", "mlp_dim": r"\.mlp_(in|out)$"},
    embedders=Embedders("in_dims", (r"emb_in", r"time_in", r"ref_time_in", r"txt_in", *MODULATIONS, r"final_layer")),
    block_choices={"train_block_indices": r"^single_blocks\.(\d+)\."},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
