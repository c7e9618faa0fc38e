"""Encode the images of a data set and store the latents next to them, where the next training run finds them.

Accepts the options of train_network.py; with --sdxl or --flux those of the SDXL or FLUX.1 script. FLUX.1 needs only
--ae.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from torch import nn

from library import train_util as train_util
from library.architectures.flux import assembly as flux
from library.architectures.flux.load import load_ae
from library.architectures.flux.options import FluxOptions
from library.architectures.sd import assembly as sd
from library.architectures.sdxl import assembly as sdxl
from library.architectures.sdxl.options import SdxlOptions
from library.data.plan.data_plan import DataPlan
from library.data.sources.folders.metadata_file import MetadataEntry
from library.errors import UserError
from library.options.train import TrainOptions
from library.protocols import Architecture, LatentCodec
from library.training.command_line import caching
from library.training.command_line.cli import add_missing, build_parser, from_program
from library.training.command_line.option_checks import check_data


def setup_parser() -> argparse.ArgumentParser:
    """Return the options of the three training scripts, plus --sdxl, --flux and --skip_existing."""
    parser = build_parser(FluxOptions)
    add_missing(parser, SdxlOptions)
    parser.add_argument("--sdxl", action="store_true", help="the base model is SDXL")
    parser.add_argument("--flux", action="store_true", help="the base model is FLUX.1")
    parser.add_argument("--skip_existing", action="store_true", help="trust existing files by name: --skip_cache_check")
    return parser


def read_options(args: argparse.Namespace, **values: bool) -> TrainOptions:
    """Return the options of the requested base model, overridden by `values`.

    Raises UserError for contradictory or invalid options.
    """
    args = from_program(setup_parser(), args)
    if args.sdxl and args.flux:
        raise UserError("--sdxl and --flux name two base models; remove one of them")
    kind: type[TrainOptions] = SdxlOptions if args.sdxl else FluxOptions if args.flux else TrainOptions
    overrides = {"skip_cache_check": args.skip_existing or args.skip_cache_check}
    options = kind.from_args(argparse.Namespace(**{**vars(args), **overrides, **values}))
    check_data(options)
    return options


BUILD: Mapping[type[TrainOptions], Callable[[Any], Architecture]] = {
    TrainOptions: sd.build, SdxlOptions: sdxl.build, FluxOptions: flux.build,
}  # fmt: skip


def open_vae(options: TrainOptions) -> tuple[LatentCodec, Callable[[], nn.Module]]:
    """Return the latent codec and a function that loads the VAE; for FLUX.1 with --ae, only that file is opened."""
    if isinstance(options, FluxOptions) and options.flux.ae:
        return flux.CODEC, partial(load_ae, options.flux.ae, options)
    arch = BUILD[type(options)](options)
    return arch.codec, arch.load.vae


def cache_to_disk(args: argparse.Namespace) -> None:
    """Encode every image whose cache entry is missing or stale. Raises UserError."""
    cache_images(args)


def cache_images(args: argparse.Namespace, entries: Sequence[tuple[str, MetadataEntry]] | None = None) -> DataPlan:
    """Encode the images and return the data plan with their buckets; `entries` is the metadata file if already read."""
    options = read_options(args, cache_latents=True, cache_latents_to_disk=True)
    return caching.cache_images(options, *open_vae(options), entries)


main = caching.caching_command(setup_parser, cache_to_disk)

if __name__ == "__main__":
    sys.exit(main())
