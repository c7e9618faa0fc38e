"""The `BaseModelSpec` of Qwen-Image 2.1."""

import re
from collections.abc import Mapping

from library.architectures.qwen_image_21.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.qwen_image_21.layers import TARGETS
from library.architectures.qwen_image_21.load import FILES
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.checkpoints.adapter_names import FileNaming
from library.checkpoints.base_model_spec import ALL, DIFFUSERS, GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import transformer_fields

WIDTH = 4096

FUSED_GATES = Gap(
    KOHYA | GENERIC,
    r".*_img_mlp_(gate_layer|proj)",
    "in a checkpoint with a fused gate_up, such as its own, it finds gate_layer and proj only under diffusers' names",
)
WHOLE_GATES = Gap(
    DIFFUSERS, r".*_img_mlp_gate_up", "it finds the fused gate_up only under kohya's and the generic names"
)
NO_FUSED_GATES = Gap(ALL, r".*_img_mlp_gate_up", "it has no fused gate_up")
SPLIT_GATES = Gap(KOHYA, r"lora_unet_.*_gate_layer", "it splits kohya's gate_layer at the underscore")


def explain_outer_names(modules: Mapping[str, FileNaming | None]) -> str | None:
    """Return why diffusers refuses a file with modulation or text layers under kohya's names; None if it does not."""
    outer = [name for name in modules if re.match(r"lora_unet_(modulation|txt_in)_", name)]
    return f"it mistakes kohya's {outer[0]} for a layer of a block and fails" if outer else None


SPECS = (
    BaseModelSpec(
        **transformer_fields(FILES.transformer, TARGETS, RECIPE, QwenImage21Options, build, build_objective, LATENTS),
        checkpoint=(Sign(r"(^|\.)txt_in\.text_norm\.weight$"),),
        adapter=(
            Sign(r"_img_mlp_(gate_layer|gate_up|proj|out)_|_txt_in_(in|out)_layer_"),
            Sign(r"_transformer_blocks_\d+_attn_to_(q|k|v|out_0)_", width=WIDTH),
        ),
        version=r"qwen_image_21",
        architecture=r"(?i)qwen-image-2\.1",
        pipelines=("QwenImage21",),
        readers={
            "ComfyUI": Reader(ALL, NONE, gaps=(FUSED_GATES, WHOLE_GATES)),
            "diffusers": Reader(ALL, NONE, gaps=(SPLIT_GATES, NO_FUSED_GATES), refuses=explain_outer_names),
        },
    ),
)
