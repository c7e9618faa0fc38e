"""The `BaseModelSpec` of Z-Image."""

from library.architectures.zimage.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.zimage.layers import TARGETS
from library.architectures.zimage.load import FILES
from library.architectures.zimage.options import ZImageOptions
from library.checkpoints.base_model_spec import ALL, GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import transformer_fields

WIDTH = 3840

# ComfyUI does not find what musubi-tuner saves by default: diffusers' paths under kohya's prefix.
SPLIT_NAMES = Gap(
    KOHYA,
    r"lora_unet_(.*_attention_to_(q|k|v|out_0)|all_.*)",
    "under kohya's names it finds the layers of the original checkpoint, not diffusers' to_q, to_k, to_v, to_out",
)
ORIGINAL_NAMES = Gap(
    GENERIC,
    r"diffusion_model_(.*_attention_(qkv|out)|x_embedder|final_layer_.*)",
    "of the generic names it finds those that its own layers have too, not qkv, out, x_embedder and final_layer",
)
OUTER_NAMES = Gap(
    KOHYA, r"lora_unet_(x_embedder|final_layer_.*)", "it finds no x_embedder and final_layer under kohya's names"
)

SPECS = (
    BaseModelSpec(
        **transformer_fields(FILES.transformer, TARGETS, RECIPE, ZImageOptions, build, build_objective, LATENTS),
        checkpoint=(Sign(r"(^|\.)(cap|x)_pad_token$"),),
        adapter=(
            Sign(r"_attention_to_(q|k|v|out)_|_adaLN_modulation_0_|_all_(x_embedder|final_layer)_"),
            Sign(r"_layers_\d+_(attention|feed_forward)_", width=WIDTH),
        ),
        version=r"zimage",
        architecture=r"(?i)z-image",
        pipelines=("ZImage",),
        readers={
            "ComfyUI": Reader(ALL, NONE, gaps=(SPLIT_NAMES,)),
            "diffusers": Reader(ALL, NONE, gaps=(ORIGINAL_NAMES, OUTER_NAMES)),
        },
        variants={r"siglip_embedder\.": "Z-Image Omni, which cannot be trained"},
    ),
)
