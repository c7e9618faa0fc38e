"""The `BaseModelSpec` of MOSS-Image."""

from library.architectures.moss_image.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.moss_image.layers import TARGETS
from library.architectures.moss_image.load import FILES
from library.architectures.moss_image.options import MossImageOptions
from library.checkpoints.base_model_spec import GENERIC, NONE, BaseModelSpec, Reader, Sign
from library.models.transformer_file import transformer_fields

SPECS = (
    BaseModelSpec(
        **transformer_fields(FILES.transformer, TARGETS, RECIPE, MossImageOptions, build, build_objective, LATENTS),
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
    ),
)
