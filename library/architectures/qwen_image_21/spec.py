"""The `BaseModelSpec` of Qwen-Image 2.1."""

import re
from collections.abc import Mapping

from library.architectures.qwen_image_21.adapter_names import NAMES, denoiser_module
from library.architectures.qwen_image_21.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.qwen_image_21.checkpoint_keys import is_linear
from library.architectures.qwen_image_21.load import MARK, MODEL
from library.architectures.qwen_image_21.model import QwenImage21, read_config
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.architectures.qwen_image_21.targets import TARGETS
from library.checkpoints.adapter_names import FileNaming
from library.checkpoints.base_model_spec import ALL, DIFFUSERS, GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import TransformerFile

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


FILE = TransformerFile(
    base="qwen_image_21",
    title=MODEL,
    architecture="Qwen-Image-2.1",
    mark=MARK,
    diffusers_mark=None,
    is_layer=is_linear,
    name=denoiser_module,
    build=QwenImage21,
    read_config=read_config,
)

SPECS = (
    BaseModelSpec(
        name="qwen_image_21",
        title="Qwen-Image 2.1",
        called="a Qwen-Image 2.1",
        script="qwen_image_21_train_network.py",
        options=QwenImage21Options,
        build=build,
        latents=LATENTS,
        objective=build_objective,
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
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=FILE.open,
        view_for_networks=FILE.view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
