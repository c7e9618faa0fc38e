"""Encode the captions of a data set and store the results next to the images, where the next training run finds them.

Accepts the options of sdxl_train_network.py with --sdxl and of flux_train_network.py with --flux. Text encoder outputs
of Stable Diffusion 1.x and 2.x are not cached.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library import train_util as train_util
from library.base.errors import error_in
from library.training.command_line.caching_script import CachingScript
from tools.cache_latents import caching_command, read_options
from tools.cache_latents import setup_parser as setup_parser_of

__all__ = ["cache_to_disk", "main", "setup_parser", "train_util"]

setup_parser = partial(setup_parser_of, "captions")
CAPTIONS = {
    "cache_text_encoder_outputs": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
}


def cache_to_disk(args: argparse.Namespace) -> None:
    """Encode every caption whose cache entry is missing or stale. Raises UserError."""
    from library.training.command_line.caching import cache_captions

    assembly, options = read_options(args, **CAPTIONS)
    arch = assembly.build(options)
    if arch.text_cache is None:
        raise error_in("--sdxl", cause="needs")(
            "use --sdxl or --flux: the text encoder outputs of Stable Diffusion 1.x and 2.x are not cached, because "
            "their encoder is fast"
        )
    cache_captions(options, arch)


main = caching_command(cache_to_disk, CAPTIONS, CachingScript.cache_captions)

if __name__ == "__main__":
    sys.exit(main())
