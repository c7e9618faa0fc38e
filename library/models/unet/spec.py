"""Parts of `BaseModelSpec` that the models with a U-Net share."""

from collections.abc import Mapping

from library.checkpoints.base_model_spec import ALL, DIFFUSERS, GENERIC, KOHYA, Gap, Program, Reader
from library.models.unet.checkpoint_keys import UNET_NAME

# In checkpoints: the layout of a single file, and of a diffusers folder, whose names begin with its folder here.
UNET = rf"^({UNET_NAME}|unet\.)"
TEXT_INPUT = UNET + r".*attn2\.to_k\.weight$"  # as wide as the text that the U-Net listens to
ATTENTION_INPUT = UNET + r".*\.proj_in\.weight$"

# In the keys of adapter files, with underscores for dots.
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
                "it looks for attention layers of the U-Net under other names than these diffusers names",
            ),
        ),
    ),
    "Forge": Reader(KOHYA | GENERIC, KOHYA),
    "A1111-style": Reader(KOHYA, KOHYA),
    "diffusers": Reader(KOHYA | DIFFUSERS, KOHYA | DIFFUSERS),
    "stable-diffusion.cpp": Reader(ALL, KOHYA),
}
