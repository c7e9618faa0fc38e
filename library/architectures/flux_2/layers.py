"""The layers of FLUX.2: their names in the original layout, which is ours, in diffusers' and in adapter files, and what
adapters target.

ai-toolkit writes the original paths in the generic naming, musubi-tuner in kohya's; SimpleTuner and OneTrainer write
diffusers' paths.
"""

from collections.abc import Mapping

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames
from library.models.double_stream import ATTENTION, SWAPPED, TARGET_FIELDS, stream_keys
from library.models.layer_keys import GENERIC_PREFIX, KOHYA_PREFIX, Layers
from networks.core.targets.targets import AdapterTargets, Embedders

MARK, DIFFUSERS_MARK = "single_stream_modulation.lin.weight", "x_embedder.weight"
NUM_BLOCKS = {"double_blocks": 8, "single_blocks": 48}  # of dev; klein has fewer
MODULATIONS = (r"double_stream_modulation_img", r"double_stream_modulation_txt", r"single_stream_modulation")

TOP: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    **{f"{name}.lin": f"{name}.linear" for name in MODULATIONS},
    "final_layer.linear": "proj_out",
    SWAPPED: "norm_out.linear",
}
DOUBLE: Layers = {
    **ATTENTION,
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE: Layers = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
KEYS = stream_keys(TOP, DOUBLE, SINGLE, others=(GENERIC_PREFIX, KOHYA_PREFIX))
NAMES = BaseNames("flux_2", tuple(KEYS.list_names(NUM_BLOCKS)), saved_naming="generic")
TARGETS = AdapterTargets(
    **TARGET_FIELDS,
    embedders=Embedders("in_dims", (r"img_in", r"time_in", r"guidance_in", r"txt_in", *MODULATIONS)),
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
