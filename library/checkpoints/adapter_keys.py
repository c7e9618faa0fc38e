"""The keys of adapter files: one grammar for the names that all programs use.

A key is a module name and an ending: `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` by kohya and LyCORIS,
`diffusion_model.middle_block.1.proj_in.lora_A.weight` in the module paths of the original checkpoint,
`unet.mid_block.attentions.0.proj_in.lora_A.weight` by diffusers, `base_model.model.q_proj.lora_A.x.weight` by PEFT.

The grammar is not part of networks/, because the keys alone determine which programs can read a file and which base
model it belongs to.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

Naming = Literal["kohya", "generic", "diffusers", "peft", "unknown"]

PEFT_PREFIX = "base_model.model."
PREFIXES: tuple[tuple[str, Naming], ...] = (
    (PEFT_PREFIX, "peft"),
    ("lora_", "kohya"),
    ("oft_unet_", "kohya"),
    ("lycoris_", "kohya"),
    ("diffusion_model.", "generic"),
    ("model.diffusion_model.", "generic"),
    ("text_encoders.", "generic"),
    ("unet.", "diffusers"),
    ("transformer.", "diffusers"),
    ("text_conditioner.", "diffusers"),
    ("text_encoder.", "diffusers"),
    ("text_encoder_2.", "diffusers"),
    ("text_encoder_3.", "diffusers"),
)

MODELS = (
    "unet.", "transformer.", "diffusion_model.", "text_encoder.", "text_encoder_2.", "text_encoder_3.",
    "text_conditioner.",
)  # fmt: skip
"""Prefixes of paths in a file that name a model of the pipeline."""

ROOTLESS = (PEFT_PREFIX, "lycoris_", "lora_transformer_", "lora_unet_", "net.", "model.diffusion_model.", *MODELS)
"""Path prefixes that do not identify the sub-model, or that belong to the other layout: those of PEFT, of LyCORIS as
SimpleTuner and others use it, and of OneTrainer."""

TEXT_ENCODERS = ("lora_te", "text_encoder", "clip_l.", "clip_g.", "t5.")
TEXT_PATHS = ("text_model", "encoder.", "encoder_")  # in CLIP and T5 but in no denoiser

DOWN, UP = "lora_down.weight", "lora_up.weight"
ENDINGS: tuple[tuple[str, str], ...] = (  # (pattern, kohya's leaf name; "" keeps the matched text)
    (r"lora_down\.weight|lora_A(?:\.[\w-]+)?\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight", DOWN),
    (r"lora_up\.weight|lora_B(?:\.[\w-]+)?\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight", UP),
    (r"dora_scale|lora_magnitude_vector(?:(?:\.[\w-]+)?\.weight)?", "dora_scale"),
    (r"oft_R(?:\.[\w-]+)?\.weight", "oft_R.weight"),
    (r"boft_R(?:\.[\w-]+)?", "boft_R"),
    (r"oft_(?:blocks|diag)(?:\.\d)?", ""),
    (r"boft_s(?:\.[\w-]+)?", "boft_s"),
    (r"lora_mid\.weight|alpha|w_norm|b_norm|hada_\w+|lokr_\w+|diff(?:_b)?", ""),
)
UP_BIASES = (".lora_B.bias", ".lora_up.bias")  # trained by PEFT's lora_bias; no adapter kind here supports them
KEY_PATTERNS = tuple((re.compile(rf"(.+?)\.({pattern})"), leaf) for pattern, leaf in ENDINGS)
# Old versions of diffusers write the first form, the trainers of base-model authors the second.
PROCESSOR_KEY = re.compile(r"(.+)\.processor\.((to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight)")
OWN_PROCESSOR_KEY = re.compile(r"(.+\.processor\.\w+_lora\d?)\.((down|up)\.weight)")
KOHYA_KEY = re.compile(r"([^.]+)\.(.+)")  # splits keys of any kind: kohya's module names have no dots
WIDE_LEAVES = frozenset((DOWN, "hada_w1_b"))  # second dimension: the layer's input width, for Linear layers
# The input width is the product of the column counts of these leaves.
KRONECKER_SIDES = {"lokr_w1": 0, "lokr_w1_b": 0, "lokr_w2": 1, "lokr_w2_b": 1}


@dataclass(frozen=True)
class AdapterKey:
    """A parsed key."""

    module: str  # as in the file
    ending: str  # as in the file
    leaf: str  # kohya's name of the ending, such as `lora_down.weight`
    naming: Naming

    @classmethod
    def parse(cls, text: str) -> "AdapterKey | None":
        """Parse a key; return None if it belongs to no kind of adapter."""
        # The processor is dropped from the module's name: base models are recognised by the layer's name right after
        # the attention's.
        if match := PROCESSOR_KEY.fullmatch(text):
            # diffusers' to_out is a list of the layer and a dropout.
            layer = "to_out.0" if match[3] == "to_out" else match[3]
            module = f"{match[1]}.{layer}"
            return cls(module, match[2], DOWN if match[4] == "down" else UP, recognise_naming(module))
        if match := OWN_PROCESSOR_KEY.fullmatch(text):
            return cls(match[1], match[2], DOWN if match[3] == "down" else UP, recognise_naming(match[1]))
        for pattern, leaf in KEY_PATTERNS:
            if match := pattern.fullmatch(text):
                return cls(match[1], match[2], leaf or match[2], recognise_naming(match[1]))
        if recognise_naming(text) == "kohya" and (match := KOHYA_KEY.fullmatch(text)):
            return cls(match[1], match[2], match[2], "kohya")
        return None


def recognise_naming(name: str) -> Naming:
    """Return the naming that a module's name follows."""
    return next((naming for prefix, naming in PREFIXES if name.startswith(prefix)), "unknown")


def composed_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return (number of rows or blocks, input width of the layer) by key, for tensors that determine the width of a
    Linear layer only together with others: the first matrix of a LoKr, the blocks of OFT."""
    return {**_kronecker_shapes(shapes), **_block_shapes(shapes)}


def _block_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return (number of blocks, input width) by key for OFT and BOFT layers.

    Blocks of b inputs are stored as b (b - 1) / 2 angles (oft_R) or as whole matrices (boft_R). A single oft_R block,
    which serves all inputs, is skipped.
    """
    block_shapes = {}
    for text, shape in shapes.items():
        key = AdapterKey.parse(text)
        if key is not None and key.leaf == "oft_R.weight" and len(shape) == 2 and shape[0] > 1:
            # b (b - 1) / 2 angles, solved for b.
            block_shapes[text] = (shape[0], shape[0] * ((1 + isqrt(1 + 8 * shape[1])) // 2))
        elif key is not None and key.leaf == "boft_R" and len(shape) == 4:
            block_shapes[text] = (shape[1], shape[1] * shape[2])
    return block_shapes


def _kronecker_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return (rows of the first matrix, input width) by the key of the first matrix of each LoKr."""
    firsts: dict[str, tuple[str, int, int]] = {}
    seconds: dict[str, int] = {}
    for text, shape in shapes.items():
        parsed = AdapterKey.parse(text)
        position = None if parsed is None or len(shape) != 2 else KRONECKER_SIDES.get(parsed.leaf)
        if parsed is not None and position == 0:
            firsts[parsed.module] = text, shape[0], shape[1]
        elif parsed is not None and position == 1:
            seconds[parsed.module] = shape[1]
    return {key: (rows, columns * seconds[m]) for m, (key, rows, columns) in firsts.items() if m in seconds}


def lacks_model_prefix(name: str) -> bool:
    """Return True if a module's prefix is ambiguous about its sub-model and naming."""
    is_bare = recognise_naming(name) in ("unknown", "peft") or name.startswith(("lycoris_", "lora_transformer_"))
    return is_bare or f".{PEFT_PREFIX}" in name


def bare_path(name: str) -> str:
    """Strip all prefixes from the name of a module."""
    # Prefixes nest: scripts that wrap one sub-model with PEFT write `unet.base_model.model.<path>`.
    while (path := next((name[len(p) :] for p in ROOTLESS if name.startswith(p)), name)) != name:
        name = path
    return name


def replace_module(other: str, key: str, module: str, leaf: str) -> str:
    """Replace the module part of a key by `other`.

    Old diffusers keys have the processor in the middle of the module name; they get `leaf` as their new ending.
    """
    return other + (key[len(module) :] if key.startswith(module) else f".{leaf}")


def is_of_text_encoder(name: str) -> bool:
    """Return True if a module or key belongs to a text encoder, by its prefix in any naming."""
    return name.startswith(TEXT_ENCODERS) or bare_path(name).startswith(TEXT_PATHS)


def strip_peft_prefix(name: str) -> str:
    """Strip PEFT's wrapper prefix from a module's name."""
    return name.removeprefix(PEFT_PREFIX)


def to_underscores(name: str) -> str:
    """Convert a name to the underscored form in which names of all namings are compared."""
    name = strip_peft_prefix(name)
    # The paths of complete checkpoints have `model.` in front of the generic naming's `diffusion_model.`.
    return name.removeprefix("model.").replace(".", "_") if name.startswith("model.diff") else name.replace(".", "_")
