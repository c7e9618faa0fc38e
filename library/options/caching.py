"""What is encoded once and kept."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class CachingOptions(Options):
    """What is encoded once and kept."""

    cache_latents: bool = option(False, help="")
    cache_latents_to_disk: bool = option(False, help="")
    vae_batch_size: int = option(1, help="")
    skip_cache_check: bool = option(False, help="")
