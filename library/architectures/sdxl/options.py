"""The options that only Stable Diffusion XL has."""

from dataclasses import dataclass

from library.models.unet.options import INSTEAD as INSTEAD
from library.options.base import Options, group, option
from library.options.caching import TextCachingOptions
from library.options.model import ReadingOptions
from library.options.train import TrainOptions


@dataclass(frozen=True)
class SdxlSizeOptions(Options):
    """What the denoiser is told about the sizes of pictures."""

    correct_crop_coordinates: bool = option(
        False,
        own=True,
        needs_images=True,
        help="Tell the denoiser where each picture was really cut, as SDXL itself was trained. Unset tells it what "
        "sd-scripts does, the corner of the picture fitted inside its bucket, which existing recipes are made with.",
    )


@dataclass(frozen=True)
class SdxlOptions(TrainOptions):
    """All options of sdxl_train_network.py."""

    text_caching: TextCachingOptions = group(TextCachingOptions)
    reading: ReadingOptions = group(ReadingOptions)
    sizes: SdxlSizeOptions = group(SdxlSizeOptions)
