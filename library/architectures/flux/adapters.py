"""The layers of FLUX.1 and Chroma that adapters target, and their names in files.

Module paths are those of the original checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from library.architectures.flux.checkpoint_keys import APPROXIMATOR, STACKS, SWAPPED, TOP, sources
from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece
from library.models.clip import names as clip_names
from library.models.clip.clip import clip_body
from library.models.clip.view import ClipView
from library.models.t5 import T5_BLOCKS, T5_LINEAR
from networks.core.targets.targets import AdapterTargets, Embedders, Part, qkv_and_rest, thirds

NUM_BLOCKS = {"double_blocks": 19, "single_blocks": 38}
QKV_SHARES = (1, 1, 1)
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model
NUM_CLIP_LAYERS, NUM_T5_BLOCKS, NUM_APPROXIMATOR_LAYERS = 12, 24, 5
MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")  # endings of paths that Chroma lacks
VECTORS = ("time_in.", "guidance_in.", "vector_in.")  # prefixes of the paths of FLUX.1's modulation
PROCESSORS = {  # names of XLabs's trainer -> the layers whose outputs they change
    "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv", "proj_lora2": "txt_attn.proj", "proj_lora": "linear2",
}  # fmt: skip


def denoiser_paths() -> Iterator[str]:
    """Yield the path of every Linear layer, in the order of the checkpoint."""
    yield from TOP
    for stack, _, layers in STACKS:
        for number in range(NUM_BLOCKS[stack]):
            yield from (f"{stack}.{number}.{layer}" for layer in layers if not layer.endswith("_norm"))


def chroma_paths() -> Iterator[str]:
    """Yield the path of every Linear layer of Chroma, whose approximator replaces all modulation layers."""
    yield from (path for path in denoiser_paths() if not path.startswith(VECTORS) and not path.endswith(MODULATION))
    yield from (f"{APPROXIMATOR}{side}_proj" for side in ("in", "out"))
    layers = [f"{APPROXIMATOR}layers.{number}" for number in range(NUM_APPROXIMATOR_LAYERS)]
    yield from (f"{layer}.{side}_layer" for layer in layers for side in ("in", "out"))


def denoiser_module(path: str) -> ModuleNames:
    found = sources(path)
    shares = LINEAR1_SHARES if path.endswith(".linear1") else QKV_SHARES
    whole = f"transformer.{found[0]}"
    own = (f"diffusion_model.{path.removesuffix(layer)}processor.{name}"
           for name, layer in PROCESSORS.items() if path.endswith(f".{layer}"))  # fmt: skip
    pieces = tuple(Piece(f"transformer.{name}", share) for name, share in zip(found, shares, strict=False))
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=whole if len(found) == 1 else pieces,
        aliases=tuple(own),
        swaps_pair=f"{path}." == SWAPPED,
    )


def clip_module(path: str) -> ModuleNames:
    return clip_names.clip_module(path, "lora_te1", "clip_l", "text_encoder")


def t5_module(path: str) -> ModuleNames:
    return ModuleNames(
        kohya=f"lora_te3_{path.replace('.', '_')}",
        generic=f"text_encoders.t5xxl.transformer.{path}",
        diffusers=f"text_encoder_2.{path}",
        aliases=(f"lora_te2_{path.replace('.', '_')}",),
    )


def chroma_t5_module(path: str) -> ModuleNames:
    """Name a module of Chroma's T5: its only text encoder, which OneTrainer therefore does not number."""
    found = t5_module(path)
    return replace(found, aliases=(*found.aliases, f"lora_te_{path.replace('.', '_')}"))


NAMES = BaseNames(
    "flux",
    (
        *map(denoiser_module, denoiser_paths()),
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


TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("DoubleStreamBlock", "SingleStreamBlock"), attention=("SelfAttention",)),
    text_encoders=(
        Part("lora_te1", blocks=clip_names.CLIP_BLOCKS),
        T5,
    ),
    ranks={
        "img_attn_dim": r"\.img_attn\.",
        "txt_attn_dim": r"\.txt_attn\.",
        "img_mlp_dim": r"\.img_mlp\.",
        "txt_mlp_dim": r"\.txt_mlp\.",
        "img_mod_dim": r"\.img_mod\.",
        "txt_mod_dim": r"\.txt_mod\.",
        "single_dim": r"^single_blocks\.\d+\.linear",
        "single_mod_dim": r"^single_blocks\.\d+\.modulation\.",
    },
    embedders=Embedders("in_dims", (r"img_in", r"time_in", r"vector_in", r"guidance_in", r"txt_in")),
    block_choices={
        "train_double_block_indices": r"^double_blocks\.(\d+)\.",
        "train_single_block_indices": r"^single_blocks\.(\d+)\.",
    },
    subsets={"double": r"^double_blocks\.", "single": r"^single_blocks\."},
    fused={r"_attn\.qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
    elsewhere=list_network_arguments,
)
CHROMA_TARGETS = replace(
    TARGETS,
    denoiser=replace(TARGETS.denoiser, extra_blocks={"train_approximator": ("Approximator",)}),
    text_encoders=(T5,),
    ranks={name: pattern for name, pattern in TARGETS.ranks.items() if "mod_dim" not in name},
    names=CHROMA_NAMES,
)


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([CLIP-L, T5 if present], denoiser) for `create_network` and `apply_to`.

    The denoiser's own paths are those in files.
    """
    clip = [ClipView(clip_body(encoder)) for encoder in text_encoders[:1]]
    return [*clip, *text_encoders[1:]], denoiser


def view_chroma(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([T5 if present], denoiser), whose paths are those in files."""
    return [*text_encoders], denoiser
