"""The `BaseModelSpec` of HunyuanImage 2.1."""

from library.architectures.hunyuan_image.adapter_names import NAMES, denoiser_module, is_target
from library.architectures.hunyuan_image.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.hunyuan_image.checkpoint_keys import DIFFUSERS_MARK
from library.architectures.hunyuan_image.load import GLYPH_MARK, MODEL
from library.architectures.hunyuan_image.model import HunyuanImage, read_config
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.architectures.hunyuan_image.targets import TARGETS
from library.checkpoints.base_model_spec import GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import TransformerFile

WIDTH = 3584
ORIGINAL_NAMES = Gap(
    KOHYA,
    r".*_((img|txt)_mlp_fc[12]|(img|txt)_mod_linear|modulation_linear)$",
    "it expects mlp_0, mlp_2, mod_lin, modulation_lin instead of mlp_fc1, mlp_fc2, mod_linear, modulation_linear",
)

FILE = TransformerFile(
    base="hunyuan_image",
    title=MODEL,
    architecture="hunyuan-image-2.1",
    mark=GLYPH_MARK,
    diffusers_mark=DIFFUSERS_MARK,
    is_layer=is_target,
    name=denoiser_module,
    build=HunyuanImage,
    read_config=read_config,
)

SPECS = (
    BaseModelSpec(
        name="hunyuan_image",
        title="HunyuanImage 2.1",
        called="a HunyuanImage",
        script="hunyuan_image_train_network.py",
        options=HunyuanImageOptions,
        build=build,
        latents=LATENTS,
        objective=build_objective,
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
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=FILE.open,
        view_for_networks=FILE.view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
