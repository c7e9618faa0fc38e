"""The options of the script that trains Stable Diffusion XL from prompts alone."""

from dataclasses import dataclass

from library.architectures.sdxl.options import SdxlOptions
from library.options.leco import LecoOptions


@dataclass(frozen=True)
class SdxlLecoOptions(LecoOptions, SdxlOptions):
    """All options of sdxl_train_leco.py."""
