"""The `BaseModelSpec` of HunyuanImage 2.1."""

from library.architectures.hunyuan_image.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.hunyuan_image.layers import TARGETS
from library.architectures.hunyuan_image.load import TRANSFORMER
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.checkpoints.base_model_spec import GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import transformer_fields

WIDTH = 3584
ORIGINAL_NAMES = Gap(
    KOHYA,
    r".*_((img|txt)_mlp_fc[12]|(img|txt)_mod_linear|modulation_linear)$",
    "it expects mlp_0, mlp_2, mod_lin, modulation_lin instead of mlp_fc1, mlp_fc2, mod_linear, modulation_linear",
)

SPECS = (
    BaseModelSpec(
        **transformer_fields(
            TRANSFORMER, TARGETS, RECIPE, HunyuanImageOptions, build, build_objective, LATENTS, called="a HunyuanImage"
        ),
        checkpoint=(Sign(r"txt_in\.individual_token_refiner|byt5_in\."),),
        adapter=(
            Sign(r"_blocks_\d+_(img|txt)_(mod_linear|mlp_fc[12])|_single_blocks_\d+_modulation_linear"),
            Sign(r"_((double|single)_blocks|single_transformer_blocks)_\d+_", width=WIDTH),
            Sign(r"^transformer_transformer_blocks_", width=WIDTH),
        ),
        version=r"hunyuan-image",
        architecture=r"hunyuan-image",
        pipelines=("HunyuanImage",),
        readers={"ComfyUI": Reader(KOHYA | GENERIC, NONE, gaps=(ORIGINAL_NAMES,))},
    ),
)
