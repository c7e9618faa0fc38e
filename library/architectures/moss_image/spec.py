"""The `BaseModelSpec` of MOSS-Image."""

from library.architectures.moss_image.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.moss_image.layer_names import NAMES, TARGETS, denoiser_module, is_linear
from library.architectures.moss_image.load import MARK, MODEL
from library.architectures.moss_image.model import MossImage, read_config
from library.architectures.moss_image.options import MossImageOptions
from library.checkpoints.base_model_spec import GENERIC, NONE, BaseModelSpec, Reader, Sign
from library.models.transformer_file import TransformerFile

FILE = TransformerFile(
    base="moss_image",
    title=MODEL,
    architecture=MODEL,
    mark=MARK,
    diffusers_mark=None,
    is_layer=is_linear,
    name=denoiser_module,
    build=MossImage,
    read_config=read_config,
)

SPECS = (
    BaseModelSpec(
        name="moss_image",
        title=MODEL,
        called="a MOSS-Image",
        script="moss_image_train_network.py",
        options=MossImageOptions,
        build=build,
        latents=LATENTS,
        objective=build_objective,
        checkpoint=(Sign(r"(^|\.)shared_block_modulation\."),),
        adapter=(
            Sign(r"_layers_\d+_proj_(q|k|v|o|qkv|ffn_up_gate|ffn_down)_"),
            Sign(r"_text_embedder_(proj|blocks_\d+_(qkv|proj|ffn_gate|ffn_up|ffn_down))_"),
            Sign(r"_(shared_block_modulation|video_(head_modulation|embedder)|final_linear_video)_"),
        ),
        version=r"moss_image",
        architecture=r"(?i)moss-image",
        pipelines=("MOSSImage", "MossImage"),
        readers={"ComfyUI": Reader(GENERIC, NONE)},
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=FILE.open,
        view_for_networks=FILE.view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
