"""Encode the images of a data set and store the latents next to them, where the next training run finds them.

Accepts the options of train_network.py; with --sdxl, --flux, --zimage and the like those of the script of that base
model. FLUX.1 needs only --ae; with --zimage and the other base models that musubi-tuner trains, --vae is enough.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from library import train_util as train_util
from library.architectures.flux.options import FluxOptions
from library.architectures.scripts import list_scripts, script_of
from library.architectures.sdxl.options import SdxlOptions
from library.base.errors import about
from library.options.dit import DitTrainOptions
from library.options.train import TrainOptions
from library.training.command_line.caching_options import show_for_caching
from library.training.command_line.caching_script import CachingScript, check_caching
from library.training.command_line.cli import add_missing, build_parser, check_words, from_program
from library.training.command_line.option_checks import check_data

if TYPE_CHECKING:  # the options are checked before torch is imported
    from torch import nn

    from library.data.plan.data_plan import DataPlan
    from library.data.sources.folders.metadata_file import MetadataEntry
    from library.protocols import LatentCodec

LATENTS = {"cache_latents": True, "cache_latents_to_disk": True}


def setup_parser(encoded: str = "images") -> argparse.ArgumentParser:
    """Return the options of the three training scripts, plus --sdxl, --flux, --zimage and the like, and
    --skip_existing, for a command of what is `encoded`."""
    parser = build_parser(FluxOptions)
    add_missing(parser, SdxlOptions)
    parser.add_argument("--sdxl", action="store_true", help="the base model is SDXL")
    parser.add_argument("--flux", action="store_true", help="the base model is FLUX.1")
    for family in list_families():
        text = f"the base model is that of {family}_train_network.py; `--{family} --help` shows its options"
        parser.add_argument(f"--{family}", action="store_true", help=text)
    parser.add_argument("--skip_existing", action="store_true", help="trust existing files by name: --skip_cache_check")
    return show_for_caching(parser, encoded, "", ("sdxl", "flux", *list_families(), "skip_existing"))


def read_options(args: argparse.Namespace, **values: bool) -> tuple[Any, TrainOptions]:
    """Return the assembly module of the requested base model, and its options, overridden by `values`.

    Raises UserError for contradictory or invalid options.
    """
    args = from_program(setup_parser(), args)
    package = find_package(args)
    options = script_of(package).options.from_args(override(args, values))
    check_data(options)
    return import_module(f"library.architectures.{package}.assembly"), options


def find_package(args: argparse.Namespace) -> str:
    """Return the package of the requested base model. Raises UserError if two are requested."""
    flags = [name for name in ("sdxl", "flux", *list_families()) if getattr(args, name, False)]
    if len(flags) > 1:
        others = [f"--{flags[1]}"]
        raise about(f"--{flags[0]}", others=others)(f"and {others[0]} name two base models", "remove one of them")
    return flags[0] if flags else "sd"


def list_families() -> list[str]:
    """Return the packages whose caching commands need neither the whole base model nor its options."""
    ending = "_train_network.py"
    return [s.name.removesuffix(ending) for s in list_scripts() if issubclass(s.options, DitTrainOptions)]


def override(args: argparse.Namespace, values: Mapping[str, bool]) -> argparse.Namespace:
    skips = {"skip_cache_check": args.skip_existing or args.skip_cache_check}
    return argparse.Namespace(**{**vars(args), **skips, **values})


def open_vae(assembly: Any, options: TrainOptions) -> "tuple[LatentCodec, Callable[[], nn.Module]]":
    """Return the latent codec and a function that loads the VAE; for FLUX.1 with --ae, only that file is opened.

    Raises UserError for a file that does not fit.
    """
    if isinstance(options, FluxOptions) and options.parts.ae:
        from library.architectures.flux.load import load_ae

        return assembly.CODEC, partial(load_ae, options.parts.ae, options)
    arch = assembly.build(options)
    return arch.codec, arch.load.vae


def cache_to_disk(args: argparse.Namespace) -> None:
    """Encode every image whose cache entry is missing or stale. Raises UserError."""
    cache_images(args)


def cache_images(args: argparse.Namespace, entries: "Sequence[tuple[str, MetadataEntry]] | None" = None) -> "DataPlan":
    """Encode the images and return the data plan with their buckets; `entries` is the metadata file if already read."""
    from library.training.command_line import caching

    assembly, options = read_options(args, **LATENTS)
    return caching.cache_images(options, *open_vae(assembly, options), entries)


def caching_command(
    action: Callable[[argparse.Namespace], object],
    values: Mapping[str, bool],
    cache_family: Callable[[CachingScript, Sequence[str]], int],
) -> Callable[..., int]:
    """Return the `main` of a command that encodes with the options `values`: it takes a command line, by default the
    process's, and returns the exit status, 0 for success and 1 for an error; it exits for options that are refused.
    `cache_family` runs it for one of `list_families`, whose options are its own."""

    def check(args: argparse.Namespace) -> None:
        check_caching(script_of(find_package(args)), args, override(args, values))

    def main(argv: Sequence[str] | None = None) -> int:
        words = sys.argv[1:] if argv is None else list(argv)
        families = {f"--{name}": name for name in list_families()}
        flags = {word for word in words if word in ("--sdxl", "--flux", *families)}
        if len(flags) == 1 and (family := families.get(*flags)) is not None:
            return cache_family(CachingScript(family), [word for word in words if word not in flags])
        command_line = check_words(setup_parser("images" if values == LATENTS else "captions"), check, argv)
        command_line.start_log()
        from library.training.command_line.caching import run_caching

        return run_caching(command_line, action)

    return main


main = caching_command(cache_to_disk, LATENTS, CachingScript.cache_latents)

if __name__ == "__main__":
    sys.exit(main())
