"""The `BaseModelSpec` of FLUX.3 Image Klein."""

from library.architectures.flux_3.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.flux_3.layers import TARGETS
from library.architectures.flux_3.load import FILES
from library.architectures.flux_3.options import Flux3Options
from library.checkpoints.base_model_spec import DIFFUSERS, GENERIC, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import transformer_fields

NO_EMBEDDERS = Gap(
    GENERIC,
    r"diffusion_model_((emb_in|time_in|ref_time_in|(early|single)_stream_modulations|final_layer)_.*|txt_in)",
    "under generic names it finds the layers of the blocks alone",
)

SPECS = (
    BaseModelSpec(
        **transformer_fields(FILES.transformer, TARGETS, RECIPE, Flux3Options, build, build_objective, LATENTS),
        checkpoint=(Sign(r"(^|\.)early_stream_modulations\."),),
        adapter=(
            Sign(r"_(early_stream_modulations|single_stream_modulations|emb_in|x_embedders|ref_time_in)_"),
            Sign(r"_mode_blocks_|_single_blocks_\d+_([qkv]_proj|attn_out|mlp_in|mlp_out)_"),
            Sign(r"_single_transformer_blocks_\d+_(attn_to_out_0|ff_linear_(in|out))_"),
        ),
        version=r"FLUX\.3",
        architecture=r"(?i)flux\.3",
        pipelines=("Flux3",),
        readers={
            "ComfyUI": Reader(GENERIC, NONE),
            "diffusers": Reader(GENERIC | DIFFUSERS, NONE, gaps=(NO_EMBEDDERS,)),
        },
    ),
)
