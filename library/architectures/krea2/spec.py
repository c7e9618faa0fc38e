"""The `BaseModelSpec` of Krea 2."""

import re
from collections.abc import Mapping

from library.architectures.krea2.adapter_names import NAMES, denoiser_module
from library.architectures.krea2.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.krea2.checkpoint_keys import DIFFUSERS_MARK, KEYS, MARK
from library.architectures.krea2.model import SingleStreamDiT, read_config
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.targets import TARGETS
from library.checkpoints.adapter_names import FileNaming
from library.checkpoints.base_model_spec import ALL, DIFFUSERS, GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import TransformerFile

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

FILE = TransformerFile(
    base="krea2",
    title="Krea 2",
    architecture="Krea-2",
    mark=MARK,
    diffusers_mark=DIFFUSERS_MARK,
    is_layer=KEYS.is_linear,
    name=denoiser_module,
    build=SingleStreamDiT,
    read_config=read_config,
)

SPECS = (
    BaseModelSpec(
        name="krea2",
        title="Krea 2",
        called="a Krea 2",
        script="krea2_train_network.py",
        options=Krea2Options,
        build=build,
        latents=LATENTS,
        objective=build_objective,
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
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=FILE.open,
        view_for_networks=FILE.view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
