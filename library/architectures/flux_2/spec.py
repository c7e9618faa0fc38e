"""The `BaseModelSpec` of FLUX.2."""

from library.architectures.flux_2.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.flux_2.layers import TARGETS
from library.architectures.flux_2.load import TRANSFORMER
from library.architectures.flux_2.options import Flux2Options
from library.checkpoints.base_model_spec import ALL, DIFFUSERS, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import transformer_fields

BLOCKS = (
    r"_(double|single)_blocks_\d+_"
    r"|_transformer_blocks_\d+_(attn_(to_(q|k|v|out_0|add_out)|add_[qkv]_proj)|ff(_context)?_linear_in)_"
)
WIDTHS = (4096, 6144)  # of klein 9B and dev; klein 4B is as wide as FLUX.1
# klein 4B is as wide as FLUX.1, but its SwiGLU has another width inside.
KLEIN_4B_MLP, KLEIN_4B_SINGLE = 9216, 12288  # inputs of the second layers of its MLP and of its single blocks

NO_NUMBERS = Gap(
    DIFFUSERS,
    r"transformer_(time_guidance_embed|(double|single)_stream_modulation)_.*",
    "it does not find the embeddings of noise level and guidance and the modulation under diffusers' names",
)
NO_MODULATION = Gap(
    KOHYA,
    r"lora_unet_(guidance_in|(double|single)_stream_modulation|final_layer_adaLN_modulation)_.*",
    "under kohya's names it does not find the embedding of guidance and the modulation",
)


SPECS = (
    BaseModelSpec(
        **transformer_fields(TRANSFORMER, TARGETS, RECIPE, Flux2Options, build, build_objective, LATENTS),
        checkpoint=(Sign(r"(^|\.)(single|double)_stream_modulation(_img|_txt)?\.lin"),),
        adapter=(
            Sign(r"_(single|double)_stream_modulation_|_attn_to_qkv_mlp_proj|_ff(_context)?_linear_(in|out)_"),
            *(Sign(BLOCKS, width=width) for width in WIDTHS),
            Sign(r"_double_blocks_\d+_(img|txt)_mlp_2_", width=KLEIN_4B_MLP),
            Sign(r"_single_blocks_\d+_linear2_", width=KLEIN_4B_SINGLE),
            Sign(r"_single_transformer_blocks_\d+_attn_to_out_"),
        ),
        version=r"flux_2",
        architecture=r"(?i)flux\.2",
        pipelines=("Flux2",),
        readers={
            "ComfyUI": Reader(ALL, NONE, gaps=(NO_NUMBERS,)),
            "diffusers": Reader(ALL, NONE, gaps=(NO_MODULATION,)),
        },
    ),
)
