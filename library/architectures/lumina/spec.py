"""The `BaseModelSpec` of Lumina Image 2.0."""

import re
from collections.abc import Mapping

from library.architectures.lumina.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.lumina.layers import TARGETS
from library.architectures.lumina.load import TRANSFORMER
from library.architectures.lumina.options import LuminaOptions
from library.checkpoints.adapter_names import FileNaming
from library.checkpoints.base_model_spec import DIFFUSERS, GENERIC, KOHYA, NONE, BaseModelSpec, Certainty, Reader, Sign
from library.models.transformer_file import transformer_fields

BLOCK = frozenset(("attention_qkv", "attention_out", *(f"feed_forward_w{n}" for n in (1, 2, 3)), "adaLN_modulation_1"))


def explain_parts_of_blocks(modules: Mapping[str, FileNaming | None]) -> str | None:
    """Return why diffusers reads nothing of a file; None if it reads the file.

    Its converter of generic names counts the blocks of each stack and requires every module of each block.
    """
    if not any(naming == "generic" and not name.startswith("text_") for name, naming in modules.items()):
        return None
    stacks: dict[str, dict[int, set[str]]] = {}
    for module in modules:
        match = re.fullmatch(r"diffusion_model_(layers|noise_refiner|context_refiner)_(\d+)_(.*)", module)
        if match is None:
            return f"it refuses Lumina 2's {module} in the generic naming, where it expects only blocks"
        stacks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    for stack, blocks in stacks.items():
        required = BLOCK - {"adaLN_modulation_1"} if stack == "context_refiner" else BLOCK
        if blocks.keys() != set(range(len(blocks))) or any(layers != required for layers in blocks.values()):
            return f"it requires every module of every block of Lumina 2's {stack} in the generic naming"
    return None


SPECS = (
    BaseModelSpec(
        **transformer_fields(
            TRANSFORMER, TARGETS, RECIPE, LuminaOptions, build, build_objective, LATENTS, called="a Lumina"
        ),
        checkpoint=(Sign(r"cap_embedder\.|context_refiner\.", Certainty.NAMES),),
        adapter=(
            Sign(r"_(noise_refiner|context_refiner)_|(unet|diffusion_model|transformer)_layers_\d+_", Certainty.NAMES),
        ),
        version=r"lumina",
        architecture=r"lumina-2",
        pipelines=("Lumina2",),
        readers={
            "ComfyUI": Reader(KOHYA | GENERIC, KOHYA | GENERIC),
            "diffusers": Reader(GENERIC | DIFFUSERS, NONE, refuses=explain_parts_of_blocks),
        },
    ),
)
