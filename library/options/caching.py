"""Caching of latents."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number, whole

NO_LATENTS = "its batches may differ each time; it can provide `latents` itself"
NO_CAPTIONS = "its captions are not known before they are drawn"


@dataclass(frozen=True)
class CachingOptions(Options, needs_images=True):
    """Caching of latents."""

    cache_latents: bool = option(False, usual=True, excludes={"dataset_class": NO_LATENTS})
    """Encode every image once before training and keep the latents in memory. Fixes the crop, so it excludes
    --random_crop and --color_aug."""
    cache_latents_to_disk: bool = option(
        False, usual=True, excludes={"dataset_class": NO_LATENTS}, affects_training=False
    )
    """Keep the encoded images in files beside them or in --cache_dir, so that the next run need not encode them again.
    Implies --cache_latents; stale entries are encoded again."""
    cache_dir: str | None = option(None, path="new folder", affects_training=False)
    """Folder for cached latents and text features, for the index of tar shards and Parquet files, and for what is read
    of images behind a URL, which need it. Unset keeps caches beside the images, and those of a folder that cannot be
    written in cache below --output_dir."""
    shared_cache_dir: str | None = option(
        None,
        path="new folder",
        affects_training=False,
        needs=("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"),
    )
    """Folder for all latents and text features that are cached in files, in place of those beside the images and in
    --cache_dir. --sweep sets it for runs that share what they would keep in memory."""
    remote_cache_gb: float = option(20.0, kind=number(0.001), needs="cache_dir", affects_training=False)
    """Size limit of the images that --cache_dir keeps after reading them over the network. The least recently used ones
    are deleted first."""
    vae_batch_size: int = option(1, kind=whole(1))
    """Number of images that the VAE encodes at a time. More is faster while caching and needs more memory."""
    skip_cache_check: bool = option(
        False, needs=("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"), affects_training=False
    )
    """Trust cache files that are already there by their name, without opening them. Starts faster on large data sets,
    but does not notice an outdated file."""


VARIANTS = 8


@dataclass(frozen=True)
class TextCachingOptions(Options):
    """Caching of the text encoders' outputs."""

    cache_text_encoder_outputs: bool = option(
        False, usual=True, needs_images=True, excludes={"dataset_class": NO_CAPTIONS}
    )
    """Encode every caption once before training, keep the results in memory and free the text encoders. Those that
    train stay where a base model can keep them; elsewhere --network_train_unet_only is needed."""
    cache_text_encoder_outputs_to_disk: bool = option(
        False, usual=True, needs_images=True, excludes={"dataset_class": NO_CAPTIONS}, affects_training=False
    )
    """Keep the encoded captions in files beside the images or in --cache_dir, so that the next run need not load the
    text encoders. Implies --cache_text_encoder_outputs; stale entries are encoded again."""
    text_encoder_batch_size: int | None = option(
        None, kind=whole(1), needs="cache_text_encoder_outputs", needs_images=True
    )
    """Number of captions that the text encoders encode at a time while caching. Unset is 1, so that no result depends
    on other captions; more is faster for short captions on a GPU."""
    text_encoder_cpu: bool = option(False)
    """Run text encoders that are not trained on the CPU. Slow: encoders that do not fit the GPU are streamed from main
    memory without it."""
    text_cache_variants: int = option(VARIANTS, kind=whole(1), needs="cache_text_encoder_outputs", needs_images=True)
    """Number of cached variants of a caption with shuffling, tag dropout or wildcards. Every draw uses one of them. A
    caption that never changes is cached once."""
