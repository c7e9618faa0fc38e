"""What is encoded once and kept."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class CachingOptions(Options):
    """What is encoded once and kept."""

    cache_latents: bool = option(
        False,
        help="Encode every picture once before training and keep the latents in memory. Fixes the crop, so it excludes"
        " --random_crop and --color_aug.",
    )
    cache_latents_to_disk: bool = option(
        False,
        help="Keep the encoded pictures in files beside them, so that the next run need not encode them again. Implies"
        " --cache_latents; entries that no longer fit the picture or the VAE are made anew.",
    )
    vae_batch_size: int = option(
        1,
        at_least=1,
        help="Pictures that the VAE encodes at a time. More is faster while caching and needs more memory.",
    )
    skip_cache_check: bool = option(
        False,
        needs=("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"),
        help="Trust cache files that are already there by their name, without opening them. Starts faster on large "
        "data sets, but does not notice an outdated file.",
    )
