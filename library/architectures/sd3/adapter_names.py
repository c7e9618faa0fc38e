"""The names of the layers of Stable Diffusion 3 and 3.5 in adapter files.

Module paths are those of the original checkpoint.
"""

from collections.abc import Iterator

from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece, text_module
from library.models.clip.names import clip_module, clip_paths
from library.models.t5 import T5_LINEAR

MAX_DEPTH = 38  # of SD3.5 large; the others have 24 blocks
NUM_CLIP_LAYERS = {"clip_l": 12, "clip_g": 32}
NUM_T5_LAYERS = 24


EMBEDDERS = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}


STREAMS = {  # stream -> (its names in a block of diffusers: q, k, v, output, modulation, MLP in, MLP out)
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "norm1.linear", "ff.net.0.proj", "ff.net.2"),
    "context_block": (
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("norm1_context.linear", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
}


def denoiser_module(path: str, diffusers: str | tuple[str, ...]) -> ModuleNames:
    """Name one module by its path in the original checkpoint and its diffusers name, or one for each third of its rows.

    Modulations of two parts have the shift first here and the scale first in diffusers.
    """
    fused = () if isinstance(diffusers, str) else diffusers
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=tuple(Piece(f"transformer.{name}", 1) for name in fused) or f"transformer.{diffusers}",
        swaps_pair=path.endswith("adaLN_modulation.1") and ".x_block." not in path,
    )


def block_modules(number: int) -> Iterator[ModuleNames]:
    for stream, (q, k, v, output, modulation, mlp_in, mlp_out) in STREAMS.items():
        here, there = f"joint_blocks.{number}.{stream}", f"transformer_blocks.{number}"
        yield denoiser_module(f"{here}.attn.qkv", tuple(f"{there}.{name}" for name in (q, k, v)))
        yield denoiser_module(f"{here}.attn.proj", f"{there}.{output}")
        yield denoiser_module(f"{here}.mlp.fc1", f"{there}.{mlp_in}")
        yield denoiser_module(f"{here}.mlp.fc2", f"{there}.{mlp_out}")
        yield denoiser_module(f"{here}.adaLN_modulation.1", f"{there}.{modulation}")
    second, there = f"joint_blocks.{number}.x_block.attn2", f"transformer_blocks.{number}.attn2"
    yield denoiser_module(f"{second}.qkv", tuple(f"{there}.to_{name}" for name in "qkv"))
    yield denoiser_module(f"{second}.proj", f"{there}.to_out.0")


def clip_modules(prefix: str, generic: str, diffusers: str) -> Iterator[ModuleNames]:
    for path in clip_paths(NUM_CLIP_LAYERS[generic]):
        yield clip_module(path, prefix, generic, diffusers)


def t5_modules() -> Iterator[ModuleNames]:
    for layer in range(NUM_T5_LAYERS):
        for path in (f"encoder.block.{layer}.{name}" for name in T5_LINEAR):
            yield text_module(path, "lora_te3", "t5xxl", "text_encoder_3")


NAMES = BaseNames(
    "sd3",
    (
        *(denoiser_module(path, name) for path, name in EMBEDDERS.items()),
        *(module for number in range(MAX_DEPTH) for module in block_modules(number)),
        *clip_modules("lora_te1", "clip_l", "text_encoder"),
        *clip_modules("lora_te2", "clip_g", "text_encoder_2"),
        *t5_modules(),
    ),
)
