"""Encode the captions of a data set and store the results beside the images, where the next training run finds them.

Takes the options of sdxl_train_network.py with --sdxl and of flux_train_network.py with --flux: the text encoder
outputs of Stable Diffusion 1.x and 2.x are not cached.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library import train_util as train_util
from library.errors import UserError
from library.processes import from_accelerator
from library.training.models.compute import Compute
from library.training.models.opening import open_accelerator, open_data_plan
from library.training.models.text_caching import prepare_text
from tools.cache_latents import build, read_options, run, setup_parser

__all__ = ["cache_to_disk", "main", "setup_parser", "train_util"]


def cache_to_disk(args: argparse.Namespace) -> None:
    """Encode every caption whose cache file is missing or outdated. Raises UserError."""
    wanted = {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}
    options = read_options(args, network_train_unet_only=True, **wanted)
    arch = build(options)
    if arch.text_cache is None:
        raise UserError(
            "use --sdxl or --flux: the text encoder outputs of Stable Diffusion 1.x and 2.x are not cached, because "
            "their encoder is fast"
        )
    processes = from_accelerator(open_accelerator(options.precision.mixed_precision))
    compute = Compute.build(options.precision, processes.device)
    plan = open_data_plan(options, arch, options.run.seed or 0, processes.count)
    prepare_text(options, arch, plan, compute.device, compute.autocast, [], processes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(cache_to_disk, argv)


if __name__ == "__main__":
    sys.exit(main())
