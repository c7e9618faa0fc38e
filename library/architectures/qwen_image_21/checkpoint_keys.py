"""Names of the denoiser's layers, which diffusers' and ComfyUI's files share."""

from collections.abc import Iterator

BLOCKS = "transformer_blocks"
TOP = (
    "img_in", "txt_in.in_layer", "txt_in.out_layer", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2", "modulation.1", "norm_out.linear", "proj_out",
)  # fmt: skip
FUSED, PARTS = "img_mlp.gate_up", ("img_mlp.gate_layer", "img_mlp.proj")  # stacked rows in some of ComfyUI's files
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *PARTS, "img_mlp.out")


def is_linear(path: str) -> bool:
    """Return True for the path of a Linear layer, including the fused one of ComfyUI's files."""
    if path.startswith(f"{BLOCKS}."):
        return path.split(".", 2)[-1] in (*LAYERS, FUSED)
    return path in TOP


def linear_paths(num_blocks: int) -> Iterator[str]:
    """Yield the path of every Linear layer for `num_blocks` blocks."""
    yield from TOP
    yield from (f"{BLOCKS}.{number}.{layer}" for number in range(num_blocks) for layer in LAYERS)
