"""The options specific to Stable Diffusion XL."""

from dataclasses import dataclass

from library.models.unet.options import INSTEAD as INSTEAD
from library.options.base import Options, group, option
from library.options.caching import TextCachingOptions
from library.options.model import BASE, ModelFile, ReadingOptions
from library.options.train import TrainOptions


@dataclass(frozen=True)
class SdxlSizeOptions(Options):
    """The size conditioning of the denoiser."""

    correct_crop_coordinates: bool = option(False, needs_images=True)
    """Condition the denoiser on the actual crop of each image, as SDXL itself was trained. Unset uses the same corner
    as sd-scripts, that of the image fitted inside its bucket, which existing recipes assume."""


@dataclass(frozen=True)
class SdxlOptions(TrainOptions):
    """All options of sdxl_train_network.py."""

    text_caching: TextCachingOptions = group(TextCachingOptions)
    reading: ReadingOptions = group(ReadingOptions)
    sizes: SdxlSizeOptions = group(SdxlSizeOptions)


FILES: tuple[ModelFile, ...] = (
    ModelFile(
        BASE, "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors", 6.9, "CreativeML Open RAIL++-M"
    ),
)
