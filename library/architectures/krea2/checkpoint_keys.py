"""Names of the denoiser's weights in the original layout, which is ours, and in diffusers'."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from library.checkpoints.weights import Weights, renamed
from library.models.shapes import count

MARK, DIFFUSERS_MARK = "txtfusion.projector.weight", "text_fusion.projector.weight"

TOP: Mapping[str, str] = {  # layers outside the blocks, and the lists of blocks
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.0": "txt_in.norm",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.linear": "final_layer.linear",
    "last.norm": "final_layer.norm",
    "last.modulation": "final_layer",
}
STACKS: Mapping[str, str] = {
    "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
    "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
    "blocks": "transformer_blocks",
}
LINEAR: Mapping[str, str] = {  # of every block
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
BLOCK: Mapping[str, str] = {
    **LINEAR,
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "prenorm": "norm1",
    "postnorm": "norm2",
    "mod": "",
}
LEAVES_IN_DIFFUSERS = {"scale": "weight", "lin": "scale_shift_table"}  # of norms, and of modulation
NORMS, MODULATIONS = ("txtmlp.0", "norm"), ("mod", "modulation")  # ends of their paths
NUM_BLOCKS = {"txtfusion.layerwise_blocks": 2, "txtfusion.refiner_blocks": 2, "blocks": 28}


def list_paths(num_blocks: Mapping[str, int]) -> Iterator[str]:
    """Yield the paths of all layers, for these numbers of blocks by stack."""
    yield from TOP
    for stack, count_of_stack in num_blocks.items():
        yield from (f"{stack}.{n}.{layer}" for n in range(count_of_stack) for layer in BLOCK)


def diffusers_path(path: str) -> str:
    """Return diffusers' path of a layer; raises KeyError for other paths."""
    match = re.fullmatch(rf"({'|'.join(STACKS)})\.(\d+)\.(.+)", path)
    return f"{STACKS[match[1]]}.{match[2]}.{BLOCK[match[3]]}".rstrip(".") if match else TOP[path]


def from_diffusers(weights: Weights) -> Weights:
    """Rename a model in diffusers' layout to our names. The rows of a block's modulation, six there, are one vector
    here, in the same order."""
    counts = {stack: count(weights.shapes, rf"{other}\.(\d+)\.") for stack, other in STACKS.items()}
    names = {
        f"{diffusers_path(path)}.{LEAVES_IN_DIFFUSERS.get(leaf, leaf)}": f"{path}.{leaf}"
        for path in list_paths(counts)
        for leaf in weight_names(path)
    }
    found = renamed(weights, lambda key: names.get(key, key))
    flat = {key: (prod(shape),) for key, shape in found.shapes.items() if key.endswith(".mod.lin")}
    return replace(found, shapes={**found.shapes, **flat})


def weight_names(path: str) -> tuple[str, ...]:
    """Return the names of the weights of a layer."""
    if path.endswith(MODULATIONS):
        return ("lin",)
    return ("scale",) if path.endswith(NORMS) else ("weight", "bias")


def is_linear(path: str) -> bool:
    """Return True for the path of a Linear layer in the layout of the original checkpoint."""
    match = re.fullmatch(rf"({'|'.join(STACKS)})\.\d+\.(.+)", path)
    return match[2] in LINEAR if match else path in TOP and "weight" in weight_names(path)


def linear_paths() -> Iterator[str]:
    """Yield the path of every Linear layer of the published model."""
    return filter(is_linear, list_paths(NUM_BLOCKS))
