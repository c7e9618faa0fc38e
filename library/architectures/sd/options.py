"""The options of the Stable Diffusion 1.x and 2.x script: only those common to all scripts."""

from collections.abc import Mapping

from library.models.unet import options as unet

SCRIPT = "train_network.py"
NOT_CACHED = "the text encoder is fast, and its outputs are not cached"

INSTEAD: Mapping[str, str] = {
    **unet.INSTEAD,
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), NOT_CACHED),
}
"""Hints for options of other scripts, appended to the error for such an option."""
