"""The `BaseModelSpec` of Krea 2."""

import re
from collections.abc import Mapping

from library.architectures.krea2.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.krea2.layers import TARGETS
from library.architectures.krea2.load import FILES
from library.architectures.krea2.options import Krea2Options
from library.checkpoints.adapter_names import FileNaming
from library.checkpoints.base_model_spec import ALL, DIFFUSERS, GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import transformer_fields

OTHER_PATHS = r"(transformer_blocks|text_fusion|txt_in|time_embed|time_mod_proj|img_in|final_layer)_.*"  # diffusers'
NO_OTHER_PATHS = Gap(
    KOHYA | GENERIC,
    rf"(lora_unet|diffusion_model)_{OTHER_PATHS}",
    "under kohya's and generic names it finds the layers of the original checkpoint, not those of diffusers",
)


def explain_unread_names(modules: Mapping[str, FileNaming | None]) -> str | None:
    """Return why diffusers reads nothing of a file; None if it reads the file."""
    if any(naming == "kohya" for naming in modules.values()):
        return "it does not read Krea 2 under kohya's names"
    if any(re.fullmatch(rf"diffusion_model_{OTHER_PATHS}", name) for name in modules):
        return "it refuses a file with its own paths of Krea 2 below diffusion_model"
    return None


WIDTH = 6144

SPECS = (
    BaseModelSpec(
        **transformer_fields(FILES.transformer, TARGETS, RECIPE, Krea2Options, build, build_objective, LATENTS),
        checkpoint=(Sign(r"(^|\.)(txtfusion|text_fusion)\.projector\."),),
        adapter=(
            Sign(r"_(txtfusion|text_fusion)_|_blocks_\d+_(attn_to_gate|(mlp|ff)_(gate|up|down))_"),
            Sign(r"_blocks_\d+_attn_(wq|wk|wv|wo|gate)_"),
            Sign(r"_transformer_blocks_\d+_attn_to_(q|k|v|out_0)_", width=WIDTH),
        ),
        version=r"krea2",
        architecture=r"(?i)krea-2",
        pipelines=("Krea2",),
        readers={
            "ComfyUI": Reader(ALL, NONE, gaps=(NO_OTHER_PATHS,)),
            "diffusers": Reader(GENERIC | DIFFUSERS, NONE, refuses=explain_unread_names),
        },
    ),
)
