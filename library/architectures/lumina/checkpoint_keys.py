"""Names of the denoiser's weights in the original layout, which is ours, and in diffusers'."""

from library.models.layer_keys import Layers
from library.models.next_dit import next_dit_keys

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
BLOCK: Layers = {
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
# The context refiner does not depend on the noise level.
CONTEXT_BLOCK = {name: theirs for name, theirs in BLOCK.items() if not name.startswith("adaLN")}
CONTEXT_BLOCK["attention_norm1"] = ("norm1",)  # a plain norm in diffusers
KEYS = next_dit_keys(TOP, BLOCK, CONTEXT_BLOCK)
