"""The names that publishers give the layers of pipelines without a script, in adapter files.

Sources: scripts/convert_ovis_image_to_diffusers.py and convert_sana_to_diffusers.py of huggingface/diffusers at
58eb52c0, and AIDC-AI/Ovis-Image: ovis_image/model.
"""

import re
from collections.abc import Collection, Mapping

from library.architectures.any_pipeline.targets import BASE
from library.checkpoints.adapter_keys import to_underscores
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece, have_own_names, name_by_path

COMPONENT = "transformer"
Table = Mapping[tuple[str, str], Mapping[str, str]]
"""(publisher's list of blocks, diffusers') -> {publisher's path: diffusers' paths}, in one block. Several paths are the
rows of one layer, in this order; `path:8` has eight times the rows of the others."""
OVIS: Table = {
    ("double_blocks", "transformer_blocks"): {
        "img_mod.lin": "norm1.linear",
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.up_proj": "ff.net.0.up",
        "img_mlp.gate_proj": "ff.net.0.gate",
        "img_mlp.down_proj": "ff.net.2",
        "txt_mod.lin": "norm1_context.linear",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.up_proj": "ff_context.net.0.up",
        "txt_mlp.gate_proj": "ff_context.net.0.gate",
        "txt_mlp.down_proj": "ff_context.net.2",
    },
    ("single_blocks", "single_transformer_blocks"): {
        "modulation.lin": "norm.linear",
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp:8",
        "linear2": "proj_out",
    },
}
SANA: Table = {
    ("blocks", "transformer_blocks"): {
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.inverted_conv.conv": "ff.conv_inverted",
        "mlp.depth_conv.conv": "ff.conv_depth",
        "mlp.point_conv.conv": "ff.conv_point",
    }
}
TABLES: Mapping[str, Table] = {"OvisImagePipeline": OVIS, "SanaPipeline": SANA, "SanaPAGPipeline": SANA}
JOINED = (("net.0.proj", ("net.0.up", "net.0.gate")),)
"""Layers that diffusers alone joins, as `BaseNames.joined`."""


def names_of(pipeline: str, modules: Collection[str]) -> BaseNames | None:
    """Return the names of the blocks that an adapter file's modules are in; None for a pipeline without a table."""
    table = TABLES.get(pipeline)
    if table is None:
        return None
    numbers = [int(number) for name in modules for number in re.findall(r"blocks[._](\d{1,3})[._]", name)]
    layers = [
        name_layer(f"{theirs}.{number}.{path}", [f"{ours}.{number}.{part}" for part in parts.split()])
        for number in range(max(numbers, default=-1) + 1)
        for (theirs, ours), paths in table.items()
        for path, parts in paths.items()
    ]
    return BaseNames(BASE, tuple(layers), joined=JOINED)


def find_published(modules: Collection[str]) -> str:
    """Return the class of the pipeline whose publisher has all of an adapter file's modules; "" if none has."""
    for pipeline in TABLES:
        names = names_of(pipeline, modules)
        # Names of diffusers are in the table too, and may be those of other models.
        if names is not None and modules and all(have_own_names(modules, names)):
            return pipeline
    return ""


def name_layer(published: str, parts: list[str]) -> ModuleNames:
    """Return the names of a layer. Kinds other than LoRA are saved under kohya's names of diffusers' paths."""
    kohya, generic = f"lora_unet_{to_underscores(published)}", f"diffusion_model.{published}"
    pieces = []
    for part in parts:
        path, _, share = part.partition(":")
        names = name_by_path(COMPONENT, path)
        pieces.append(Piece(f"{COMPONENT}.{path}", int(share or 1), (names.kohya,)))
    if len(pieces) == 1:
        return ModuleNames(kohya, generic, pieces[0].diffusers, pieces[0].aliases)
    return ModuleNames(kohya, generic, tuple(pieces))
