"""The script of Stable Diffusion 1.x and 2.x has the options that all scripts have and no others."""

from collections.abc import Mapping

from library.models.unet import options as unet

SCRIPT = "train_network.py"
NOT_CACHED = "the text encoder is fast, and its outputs are not cached"

INSTEAD: Mapping[str, str] = {
    **unet.INSTEAD,
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), NOT_CACHED),
}
"""What options of other scripts are here, as the error for one of them ends."""
