"""Encode the images of a data set and store the latents beside them, where the next training run finds them.

Takes the options of train_network.py; with --sdxl and --flux those of the scripts for SDXL and FLUX.1, of which only
--ae is needed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn

from library import train_util as train_util
from library.architectures.flux import assembly as flux
from library.architectures.flux.load import load_ae
from library.architectures.flux.options import FluxOptions
from library.architectures.sd import assembly as sd
from library.architectures.sdxl import assembly as sdxl
from library.architectures.sdxl.options import SdxlOptions
from library.data.plan.data_plan import DataPlan, build_plan
from library.data.sources.folders.metadata_file import MetadataEntry
from library.errors import UserError
from library.options.train import TrainOptions
from library.processes import from_accelerator
from library.protocols import Architecture, LatentCodec
from library.training.command_line.checks import check_data
from library.training.command_line.cli import add_missing, build_parser, from_program, parse
from library.training.command_line.main import report_error
from library.training.failures.interruption import Interrupted, Interruption
from library.training.models.base_model import encode_images
from library.training.models.opening import open_accelerator


def setup_parser() -> argparse.ArgumentParser:
    """Return the options of the training scripts that share these commands, with `sdxl`, `flux` and `skip_existing`."""
    parser = build_parser(FluxOptions)
    add_missing(parser, SdxlOptions)
    parser.add_argument("--sdxl", action="store_true", help="the base model is SDXL")
    parser.add_argument("--flux", action="store_true", help="the base model is FLUX.1")
    parser.add_argument("--skip_existing", action="store_true", help="trust existing files by name: --skip_cache_check")
    return parser


def read_options(args: argparse.Namespace, **values: bool) -> TrainOptions:
    """Return the options of the requested base model's script, some of them with other values.

    Raises UserError for contradictory and invalid values.
    """
    args = from_program(setup_parser(), args)
    if args.sdxl and args.flux:
        raise UserError("--sdxl and --flux name two base models; remove one of them")
    kind: type[TrainOptions] = SdxlOptions if args.sdxl else FluxOptions if args.flux else TrainOptions
    skips = {"skip_cache_check": args.skip_existing or args.skip_cache_check}
    options = kind.from_args(argparse.Namespace(**{**vars(args), **skips, **values}))
    check_data(options)
    return options


def build(options: TrainOptions) -> Architecture:
    """Assemble the base model of the options."""
    if isinstance(options, FluxOptions):
        return flux.build(options)
    return sdxl.build(options) if isinstance(options, SdxlOptions) else sd.build(options)


def open_vae(options: TrainOptions) -> tuple[LatentCodec, Callable[[], nn.Module]]:
    """Return the latent codec and a function that loads the VAE; for FLUX.1 without the rest of the model if
    possible."""
    if isinstance(options, FluxOptions) and options.flux.ae:
        return flux.CODEC, partial(load_ae, options.flux.ae, options)
    arch = build(options)
    return arch.codec, arch.load.vae


def cache_to_disk(args: argparse.Namespace) -> None:
    """Encode every image whose cache file is missing or outdated. Raises UserError."""
    cache_images(args)


def cache_images(args: argparse.Namespace, entries: Sequence[tuple[str, MetadataEntry]] | None = None) -> DataPlan:
    """Encode the images and return them with their buckets; `entries` are the metadata file if already read."""
    options = read_options(args, cache_latents=True, cache_latents_to_disk=True)
    processes = from_accelerator(open_accelerator(options.precision.mixed_precision))
    codec, load_vae = open_vae(options)
    seed = options.run.seed or 0
    plan = build_plan(options, codec.spec, seed, None, None, processes.count, entries)
    encode_images(load_vae, codec, options.caching, seed, plan, processes)
    return plan


def run(action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse, act, and return the exit status: 0 success, 1 error."""
    interruption = Interruption()
    interruption.install()
    args = parse(setup_parser(), argv)
    try:
        action(args)
    except Interrupted as error:
        print(f"{error} received; complete files are kept", file=sys.stderr)
        return interruption.exit_status
    except Exception as error:
        report_error(error)
        return 1
    finally:
        interruption.disarm()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(cache_to_disk, argv)


if __name__ == "__main__":
    sys.exit(main())
