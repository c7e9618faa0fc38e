"""The names that modules of a base model have in adapter files, and the base model that a file's keys speak of.

Three namings are in use: `kohya` (`lora_unet_down_blocks_0_...`), `generic` (the module paths of the original
checkpoint below `diffusion_model.` and `text_encoders.`) and `diffusers` (its module paths below `unet.` or
`transformer.`). A base model declares its modules as `BaseNames` in library/architectures/<model>/adapters.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from library.checkpoints.adapter_keys import WIDE_LEAVES, AdapterKey, underscored
from library.errors import UserError

FileNaming = Literal["kohya", "generic", "diffusers"]
NAMINGS: tuple[FileNaming, ...] = ("kohya", "generic", "diffusers")


@dataclass(frozen=True)
class Piece:
    """One of the modules that diffusers has where the original checkpoint has one with their rows below each other."""

    diffusers: str
    share: int  # of the rows, in units that all pieces of a module have in common


@dataclass(frozen=True)
class ModuleNames:
    """One module of a base model in every naming, without the end of the key (`.lora_down.weight`)."""

    kohya: str
    generic: str
    diffusers: str | tuple[Piece, ...]
    aliases: tuple[str, ...] = ()  # that other trainers use
    swaps_pair: bool = False  # where its rows are two parts, as many each as it has inputs, diffusers swaps these

    def is_in_diffusers(self, name: str) -> bool:
        """Whether a file calls the whole module by its name in diffusers."""
        return isinstance(self.diffusers, str) and underscored(name) == underscored(self.diffusers)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """diffusers' modules for this one where they are several, in the order of the rows."""
        return () if isinstance(self.diffusers, str) else self.diffusers

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every name that leads to this module."""
        whole = (self.diffusers,) if isinstance(self.diffusers, str) else tuple(p.diffusers for p in self.diffusers)
        return (self.kohya, self.generic, *whole, *self.aliases)

    def piece_of(self, name: str) -> int | None:
        """Which piece a file calls `name`, None for a name of the whole module."""
        flat = underscored(name)
        return next((i for i, piece in enumerate(self.pieces) if underscored(piece.diffusers) == flat), None)


@dataclass(frozen=True)
class BaseNames:
    """The modules of one base model that adapters may change."""

    base: str  # as `recognise_base` says it
    modules: tuple[ModuleNames, ...]

    @cached_property
    def index(self) -> Mapping[str, ModuleNames]:
        """Every spelling of a module name, with underscores for dots."""
        return {underscored(name): module for module in self.modules for name in module.spellings}

    def find(self, name: str) -> ModuleNames | None:
        """The module that `name` in a file is or is a piece of, None for one that this base model lacks."""
        return self.index.get(underscored(name))


# --- which base model a file is for ---

BASES: Mapping[str, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "lumina": "Lumina Image 2.0",
    "hunyuan_image": "HunyuanImage 2.1",
    "anima": "Anima",
}

SD2_TEXT_WIDTH = 1024
SDXL_TEXT_WIDTH = 2048
SD1_TEXT_WIDTH = 768
FLUX_WIDTH = 3072
HUNYUAN_WIDTH = 3584

UNET_MARK = r"_(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_"
NAME_MARKS: tuple[tuple[str, str], ...] = (  # the first that is found in an underscored key decides
    (r"_blocks_\d+_(img|txt)_(mod_linear|mlp_fc[12])|_single_blocks_\d+_modulation_linear", "hunyuan_image"),
    (r"_joint_blocks_", "sd3"),
    (r"_(noise_refiner|context_refiner)_|(unet|diffusion_model|transformer)_layers_\d+_", "lumina"),
    (r"_llm_adapter_|(unet|diffusion_model)_blocks_\d+_(self_attn|cross_attn|mlp)_", "anima"),
    (r"^(transformer_transformer_blocks_\d+_attn1_|text_conditioner_)", "anima"),  # SD3.5 has attn2 too
)
VERSIONS: tuple[tuple[str, str], ...] = (  # how ss_base_model_version begins
    (r"sd_v1", "sd1"), (r"sd_v2", "sd2"), (r"sdxl", "sdxl"), (r"(5-)?(medium|large)|sd3", "sd3"), (r"flux", "flux"),
    (r"lumina", "lumina"), (r"hunyuan-image", "hunyuan_image"), (r"anima", "anima"),
)  # fmt: skip
TEXT_MARK = r"(lora_te\d?|text_encoders?(_\d)?)_"
CLIP_MARK = r"(lora_te|text_encoder|text_encoders_clip_[lh]_transformer)_text_model_"
SDXL_MARK = r"^(lora_te2_|text_encoder_2_|text_encoders_clip_g_)" + rf"|{UNET_MARK}.*_transformer_blocks_[1-9]"


def recognise_base(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> str | None:
    """The base model (a key of BASES) whose modules the keys of an adapter file name, None where they do not tell.

    `shapes` has every key of the file. Sizes decide where names are shared: SD 1 and 2, FLUX.1 and HunyuanImage. Text
    encoders are shared by several base models, so a file of these alone is of the one that its metadata names.
    """
    widths = {underscored(key): shape[1] for key, shape in shapes.items() if _tells_width(key) and len(shape) > 1}
    keys = [underscored(key) for key in shapes]
    told = base_in_metadata(metadata) if all(re.match(TEXT_MARK, key) for key in keys) else None
    if told is not None:
        return told
    for mark, base in NAME_MARKS:
        if any(re.search(mark, key) for key in keys):
            return base
    is_hunyuan = HUNYUAN_WIDTH in widths.values()
    if any(re.search(r"_((double|single)_blocks|single_transformer_blocks)_\d+_", key) for key in keys):
        return "hunyuan_image" if is_hunyuan else "flux"
    if any(key.startswith("transformer_transformer_blocks_") for key in keys):
        if is_hunyuan:
            return "hunyuan_image"
        return "flux" if _width(widths, r"_attn_to_q_") == FLUX_WIDTH else "sd3"
    return _recognise_unet(keys, widths)


def base_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """The base model that the header of an adapter file names, None where it names none that is known."""
    version = metadata.get("ss_base_model_version", "")
    return next((base for pattern, base in VERSIONS if re.match(pattern, version)), None)


def _recognise_unet(keys: Sequence[str], widths: Mapping[str, int]) -> str | None:
    text_width = _width(widths, rf"{UNET_MARK}.*attn2_to_[kv]_")
    clip_width = _width(
        widths, r"^(lora_te|text_encoder|text_encoders_clip_[lh]_transformer)_text_model_.*_[qkv]_proj_"
    )
    names_are_sdxl = any(re.search(SDXL_MARK, key) for key in keys)
    has_original_paths = any(re.match(r"lora_unet_(input|middle|output)_block", key) for key in keys)
    if text_width == SDXL_TEXT_WIDTH or (names_are_sdxl and not any(key.startswith("lora_te3_") for key in keys)):
        return "sdxl"
    if has_original_paths and text_width != SD1_TEXT_WIDTH:
        return "sdxl"
    if not any(re.search(UNET_MARK, key) or re.match(CLIP_MARK, key) for key in keys):
        return None
    if text_width == SD2_TEXT_WIDTH or clip_width == SD2_TEXT_WIDTH:
        return "sd2"
    return "sd1"


def _tells_width(key: str) -> bool:
    """Whether the second dimension of a key's tensor is the width of the module's input."""
    found = AdapterKey.parse(key)
    return found is not None and found.leaf in WIDE_LEAVES


def _width(widths: Mapping[str, int], pattern: str) -> int | None:
    return next((width for key, width in widths.items() if re.search(pattern, key)), None)


def names_of_base(base: str | None, tables: Iterable[BaseNames], origin: str) -> BaseNames:
    """The names of a recognised base model. Raises UserError naming what there is when it has no table."""
    tables = tuple(tables)
    known = ", ".join(BASES.get(table.base, table.base) for table in tables)
    if base is None:
        raise UserError(f"{origin}: its keys do not tell which base model it is for; supported: {known}")
    found = next((table for table in tables if table.base == base), None)
    if found is None:
        raise UserError(f"{origin} is for {BASES[base]}, which is not supported yet; supported: {known}")
    return found
