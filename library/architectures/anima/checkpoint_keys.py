"""Names of the denoiser's layers in the original layout, which is ours, and in diffusers' two models."""

from collections.abc import Mapping

ADAPTER = "llm_adapter."  # a separate model in diffusers, with the same names inside

TOP: Mapping[str, str] = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.linear": "proj_out",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
}
ATTENTION: Mapping[str, str] = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
BLOCK: Mapping[str, str] = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{layer}.{number}": f"norm{place}.linear_{number}"
        for place, layer in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    },
}


def diffusers_path(path: str) -> str:
    """Return diffusers' path of a layer, below "transformer." or "text_conditioner."; other paths raise KeyError."""
    if path.startswith(ADAPTER):
        return f"text_conditioner.{path.removeprefix(ADAPTER)}"
    if path.startswith("blocks."):
        _, number, layer = path.split(".", 2)
        return f"transformer.transformer_blocks.{number}.{BLOCK[layer]}"
    return f"transformer.{TOP[path]}"
