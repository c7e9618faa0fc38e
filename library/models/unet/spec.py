"""Parts of `BaseModelSpec` shared by the models with a U-Net."""

from collections.abc import Mapping

from library.checkpoints.base_model_spec import ALL, DIFFUSERS, GENERIC, KOHYA, Gap, Program, Reader
from library.models.unet.checkpoint_keys import UNET_NAME

# Names in checkpoints: single files, and diffusers folders, where a name here begins with its folder.
UNET = rf"^({UNET_NAME}|unet\.)"
TEXT_INPUT = UNET + r".*attn2\.to_k\.weight$"  # its inputs are the text features
ATTENTION_INPUT = UNET + r".*\.proj_in\.weight$"

# Keys of adapter files, with underscores instead of dots.
ADAPTED_UNET = r"_(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_"
ADAPTED_TEXT_INPUT = ADAPTED_UNET + r".*attn2_to_[kv]_"
ADAPTED_CLIP = r"^(lora_te|text_encoder|text_encoders_clip_[lh]_transformer)_text_model_"

READERS: Mapping[Program, Reader] = {
    "ComfyUI": Reader(
        ALL,
        ALL,
        gaps=(
            Gap(
                DIFFUSERS,
                r"unet_.*_to_(q|k|v|out_0)$",
                "it expects other names for the attention layers of the U-Net than these diffusers names",
            ),
        ),
    ),
    "Forge": Reader(KOHYA | GENERIC, KOHYA),
    "A1111-style": Reader(KOHYA, KOHYA),
    "diffusers": Reader(KOHYA | DIFFUSERS, KOHYA | DIFFUSERS),
    "stable-diffusion.cpp": Reader(ALL, KOHYA),
}
