"""Names of the denoiser's weights in the original layout, which is ours, and in diffusers'."""

from collections.abc import Mapping

from library.models.layer_keys import Layers
from library.models.next_dit import next_dit_keys

DIFFUSERS_MARK = "all_x_embedder.2-1.weight"
PAD_TOKENS = ("cap_pad_token", "x_pad_token")  # parameters of the model itself, (1, M)

# diffusers keeps the first and last layers by patch size: "2-1" is 2 x 2 latents of one frame.
TOP: Mapping[str, str] = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
}
SAME_LAYERS = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
SAME_NORMS = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
BLOCK: Layers = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
    **{name: (name,) for name in (*SAME_LAYERS, *SAME_NORMS)},
}
CONTEXT_BLOCK = {name: theirs for name, theirs in BLOCK.items() if not name.startswith("adaLN")}
KEYS = next_dit_keys(TOP, BLOCK, CONTEXT_BLOCK, PAD_TOKENS)
