"""Names of the denoiser's weights in the original layout, which is ours, and in diffusers'."""

from library.models.double_stream import ATTENTION, SWAPPED, stream_keys
from library.models.layer_keys import Layers, Stack

DIFFUSERS_MARK = "x_embedder.weight"
APPROXIMATOR = "distilled_guidance_layer."  # Chroma's

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
    SWAPPED: "norm_out.linear",
    **{f"{APPROXIMATOR}{side}_proj": f"{APPROXIMATOR}{side}_proj" for side in ("in", "out")},
}
DOUBLE: Layers = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    **ATTENTION,
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: Layers = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
KEYS = stream_keys(
    TOP,
    DOUBLE,
    SINGLE,
    Stack(f"{APPROXIMATOR}layers", f"{APPROXIMATOR}layers", {"in_layer": ("linear_1",), "out_layer": ("linear_2",)}),
    Stack(f"{APPROXIMATOR}norms", f"{APPROXIMATOR}norms", {"": ("",)}),
)
