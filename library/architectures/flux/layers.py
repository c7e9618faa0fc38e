"""The layers of FLUX.1 and Chroma: their names in the original layout, which is ours, in diffusers' and in adapter
files, what adapters target, and the view of the models for network modules."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames, text_module
from library.models.clip import names as clip_names
from library.models.clip.clip import ClipView
from library.models.double_stream import DOUBLE_GELU, RANKS, SINGLE, SWAPPED, TARGET_FIELDS, stream_keys
from library.models.layer_keys import Stack
from library.models.t5 import T5_BLOCKS, T5_LINEAR
from networks.core.targets.targets import AdapterTargets, Embedders, Part

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
KEYS = stream_keys(
    TOP,
    DOUBLE_GELU,
    SINGLE,
    Stack(f"{APPROXIMATOR}layers", f"{APPROXIMATOR}layers", {"in_layer": ("linear_1",), "out_layer": ("linear_2",)}),
    Stack(f"{APPROXIMATOR}norms", f"{APPROXIMATOR}norms", {"": ("",)}),
    shares={"linear1": (1, 1, 1, 4)},  # the MLP is four times as wide as the model
)


NUM_BLOCKS = {"double_blocks": 19, "single_blocks": 38}
NUM_CLIP_LAYERS, NUM_T5_BLOCKS, NUM_APPROXIMATOR_LAYERS = 12, 24, 5
MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")  # ends of the paths that Chroma lacks
VECTORS = ("time_in.", "guidance_in.", "vector_in.")  # prefixes of the paths of FLUX.1's modulation
PROCESSORS = {  # names in XLabs's trainer -> the layers whose outputs they change
    "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv", "proj_lora2": "txt_attn.proj", "proj_lora": "linear2",
}  # fmt: skip


def chroma_paths() -> Iterator[str]:
    """Yield the path of every Linear layer of Chroma, whose approximator replaces all modulation layers."""
    for path in KEYS.linear_paths({**NUM_BLOCKS, f"{APPROXIMATOR}layers": NUM_APPROXIMATOR_LAYERS}):
        if not path.startswith(VECTORS) and not path.endswith(MODULATION):
            yield path


def denoiser_module(path: str) -> ModuleNames:
    xlabs_names = (f"diffusion_model.{path.removesuffix(layer)}processor.{name}"
           for name, layer in PROCESSORS.items() if path.endswith(f".{layer}"))  # fmt: skip
    return replace(KEYS.name(path), aliases=tuple(xlabs_names))


def clip_module(path: str) -> ModuleNames:
    return clip_names.clip_module(path, "lora_te1", "clip_l", "text_encoder")


def t5_module(path: str) -> ModuleNames:
    # Trainers that number the encoders without a gap have T5 as the second, sd-scripts as the third.
    aliases = (f"lora_te2_{path.replace('.', '_')}",)
    return text_module(path, "lora_te3", "t5xxl", "text_encoder_2", aliases)


def chroma_t5_module(path: str) -> ModuleNames:
    """Name a module of Chroma's T5. It is the only text encoder, so OneTrainer does not number it."""
    names = t5_module(path)
    return replace(names, aliases=(*names.aliases, f"lora_te_{path.replace('.', '_')}"))


NAMES = BaseNames(
    "flux",
    (
        *(denoiser_module(path) for path in KEYS.linear_paths(NUM_BLOCKS) if not path.startswith(APPROXIMATOR)),
        *(clip_module(f"encoder.layers.{n}.{name}") for n in range(NUM_CLIP_LAYERS) for name in clip_names.CLIP_LINEAR),
        *(t5_module(f"encoder.block.{n}.{name}") for n in range(NUM_T5_BLOCKS) for name in T5_LINEAR),
    ),
)


CHROMA_NAMES = BaseNames(
    "chroma",
    (
        *map(denoiser_module, chroma_paths()),
        *(chroma_t5_module(f"encoder.block.{n}.{name}") for n in range(NUM_T5_BLOCKS) for name in T5_LINEAR),
    ),
)


T5 = Part("lora_te3", blocks=T5_BLOCKS, needs="train_t5xxl")
MODULATION_RANKS = {
    "img_mod_dim": r"\.img_mod\.",
    "txt_mod_dim": r"\.txt_mod\.",
    "single_mod_dim": r"^single_blocks\.\d+\.modulation\.",
}
TARGETS = AdapterTargets(
    **{**TARGET_FIELDS, "ranks": {**RANKS, **MODULATION_RANKS}},
    text_encoders=(Part("lora_te1", blocks=clip_names.CLIP_BLOCKS), T5),
    embedders=Embedders("in_dims", (r"img_in", r"time_in", r"vector_in", r"guidance_in", r"txt_in")),
    names=NAMES,
    elsewhere=list_network_arguments,
)


CHROMA_TARGETS = replace(
    TARGETS,
    denoiser=replace(TARGETS.denoiser, extra_blocks={"train_approximator": ("Approximator",)}),
    text_encoders=(T5,),
    ranks=RANKS,
    names=CHROMA_NAMES,
)


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([CLIP-L, T5 if present], denoiser) for `create_network` and `apply_to`.

    The denoiser's own paths are those in files.
    """
    clip = [ClipView(encoder) for encoder in text_encoders[:1]]
    return [*clip, *text_encoders[1:]], denoiser


def view_chroma(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([T5 if present], denoiser), whose paths are those in files."""
    return [*text_encoders], denoiser
