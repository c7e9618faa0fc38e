"""The layers of Krea 2: their names in the original layout, which is ours, in diffusers' and in adapter files, and what
adapters target.

ai-toolkit and the model's authors write the original paths in the generic naming, musubi-tuner in kohya's; SimpleTuner
and OneTrainer write diffusers' paths.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.weights import Weights, rename_weights
from library.models.layer_keys import GENERIC_PREFIX, KOHYA_PREFIX, LayerKeys, Layers, Stack, list_leaves
from networks.core.targets.targets import AdapterTargets, Part

MARK, DIFFUSERS_MARK = "txtfusion.projector.weight", "text_fusion.projector.weight"

TOP: Mapping[str, str] = {
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
NORMS, MODULATIONS = ("txtmlp.0", "norm"), ("mod", "modulation")  # ends of their paths
NUM_BLOCKS = {"txtfusion.layerwise_blocks": 2, "txtfusion.refiner_blocks": 2, "blocks": 28}
BLOCK: Layers = {
    "attn.wq": ("attn.to_q",),
    "attn.wk": ("attn.to_k",),
    "attn.wv": ("attn.to_v",),
    "attn.wo": ("attn.to_out.0",),
    "attn.gate": ("attn.to_gate",),
    "mlp.gate": ("ff.gate",),
    "mlp.up": ("ff.up",),
    "mlp.down": ("ff.down",),
    "attn.qknorm.qnorm": ("attn.norm_q",),
    "attn.qknorm.knorm": ("attn.norm_k",),
    "prenorm": ("norm1",),
    "postnorm": ("norm2",),
    "mod": ("",),
}


def list_krea2_leaves(path: str) -> Mapping[str, str]:
    """Return the names of a layer's weights: ours -> diffusers'."""
    if path.endswith(MODULATIONS):
        return {"lin": "scale_shift_table"}
    return {"scale": "weight"} if path.endswith(NORMS) else list_leaves(path)


KEYS = LayerKeys(
    TOP,
    (
        Stack("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", BLOCK),
        Stack("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", BLOCK),
        Stack("blocks", "transformer_blocks", BLOCK),
    ),
    leaves=list_krea2_leaves,
    is_other=lambda path: path.endswith((*NORMS, *MODULATIONS)),
    others=(GENERIC_PREFIX, KOHYA_PREFIX),
)


def from_diffusers(weights: Weights) -> Weights:
    """Rename a model in diffusers' layout to our names.

    A block's modulation has six rows in diffusers' layout and is one vector in ours, in the same order.
    """
    names = {theirs: key for key in KEYS.our_keys(weights.shapes) for theirs in KEYS.source_keys(key)}
    renamed = rename_weights(weights, lambda key: names.get(key, key))
    # Loading reshapes a weight to its parameter, so only the declared shape changes here.
    flat = {key: (prod(shape),) for key, shape in renamed.shapes.items() if key.endswith(".mod.lin")}
    return replace(renamed, shapes={**renamed.shapes, **flat})


NAMES = BaseNames("krea2", tuple(KEYS.list_names(NUM_BLOCKS)), saved_naming="generic")
TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("SingleStreamDiT",), attention=("Attention",)),  # all Linear layers
    ranks={"attn_dim": r"^blocks\.\d+\.attn\.", "mlp_dim": r"^blocks\.\d+\.mlp\.", "txtfusion_dim": r"^txtfusion\."},
    block_choices={"train_block_indices": r"^blocks\.(\d+)\."},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
