"""Commands that encode a dataset for later runs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from library.data.plan.data_plan import DataPlan, build_plan
from library.data.sources.folders.metadata_file import MetadataEntry
from library.errors import UserError
from library.options.train import TrainOptions
from library.processes import from_accelerator
from library.protocols import Architecture, LatentCodec
from library.training.command_line.cli import parse
from library.training.command_line.main import report_error
from library.training.command_line.option_checks import check_data
from library.training.failures.interruption import Interrupted, Interruption
from library.training.models.base_model import encode_images
from library.training.models.compute import Compute
from library.training.models.opening import open_accelerator, open_data_plan
from library.training.models.text_caching import TextPlan, prepare_text

OptionsT = TypeVar("OptionsT", bound=TrainOptions)
NEVER_DELETED = "Has no effect: cache files are never deleted."


def cache_images(
    options: TrainOptions,
    codec: LatentCodec,
    load_vae: Callable[[], nn.Module],
    entries: Sequence[tuple[str, MetadataEntry]] | None = None,
) -> DataPlan:
    """Encode every image whose cache file is missing or stale. Return the images with their buckets.

    `entries` is the metadata file if already read. Raises UserError.
    """
    processes = from_accelerator(open_accelerator(options.precision.mixed_precision))
    seed = options.run.seed or 0
    plan = build_plan(options, codec.spec, seed, None, None, processes.count, entries)
    encode_images(load_vae, codec, options.caching, seed, plan, processes)
    return plan


def cache_captions(options: TrainOptions, arch: Architecture) -> None:
    """Encode every caption whose cache file is missing or stale. Raises UserError."""
    processes = from_accelerator(open_accelerator(options.precision.mixed_precision))
    compute = Compute.build(options.precision, processes.device)
    text = TextPlan.resolve(options.network, arch.text_cache)
    plan = open_data_plan(options, arch, text, options.run.seed or 0, processes.count)
    prepare_text(text, options.caching, options.precision, arch, plan, compute, [], processes)


def add_command_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of musubi-tuner's caching commands; models run in bf16 by default, as there."""
    parser.add_argument("--batch_size", type=int, help="Images or captions that are encoded at a time.")
    parser.add_argument("--num_workers", type=int, help="Threads that read images: --max_data_loader_n_workers.")
    parser.add_argument(
        "--device", help="Device to encode on, such as cpu or cuda:1. Unset is the GPU if there is one."
    )
    parser.add_argument("--skip_existing", action="store_true", help="Trust files by name: --skip_cache_check.")
    parser.add_argument("--keep_cache", action="store_true", help=NEVER_DELETED)
    parser.set_defaults(mixed_precision="bf16", max_data_loader_n_workers=0)
    return parser


def with_command_options(args: argparse.Namespace, batch_size: str, **values: object) -> argparse.Namespace:
    """Translate the options of `add_command_options`; `batch_size` is the name of that option."""
    if args.device is not None:
        select_device(args.device)
    overrides = {"skip_cache_check": args.skip_existing or args.skip_cache_check}
    if args.batch_size is not None:
        if args.batch_size < 1:
            raise UserError(f"--batch_size is {args.batch_size}, but must be at least 1")
        overrides[batch_size] = args.batch_size
    if args.num_workers is not None:
        overrides["max_data_loader_n_workers"] = args.num_workers
    return argparse.Namespace(**{**vars(args), **overrides, **values})


def select_device(text: str) -> None:
    """Make accelerate use a device. Raises UserError if the device is unknown or absent."""
    try:
        torch.empty(1, device=text)
    # torch raises AssertionError where it was built without the device.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {text} cannot be used ({reason}); use cpu, or leave it out") from None
    os.environ["ACCELERATE_TORCH_DEVICE"] = text


def cache_images_to_disk(
    kind: type[OptionsT],
    codec: LatentCodec,
    open_vae: Callable[[OptionsT], Callable[[], nn.Module]],
    args: argparse.Namespace,
) -> None:
    """Run musubi-tuner's command that encodes images, with a script's options; `open_vae` returns a loader of the
    VAE. Raises UserError."""
    cache_options = {"cache_latents": True, "cache_latents_to_disk": True}
    options = kind.from_args(with_command_options(args, "vae_batch_size", **cache_options))
    check_data(options)
    cache_images(options, codec, open_vae(options))


def cache_captions_to_disk(
    kind: type[OptionsT], build: Callable[[OptionsT], Architecture], args: argparse.Namespace
) -> None:
    """Run musubi-tuner's command that encodes captions, with a script's options; `build` builds the architecture.
    Raises UserError."""
    cache_options = {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}
    options = kind.from_args(with_command_options(args, "text_encoder_batch_size", **cache_options))
    check_data(options)
    cache_captions(options, build(options))


def caching_command(
    setup_parser: Callable[[], argparse.ArgumentParser], action: Callable[[argparse.Namespace], object]
) -> Callable[..., int]:
    """Return the `main` of a command: it takes a command line, by default the process's, and returns the exit status,
    0 for success and 1 for an error."""

    def main(argv: Sequence[str] | None = None) -> int:
        interruption = Interruption()
        interruption.install()
        args = parse(setup_parser(), argv)
        try:
            action(args)
        except Interrupted as error:
            print(f"{error} received; complete files are kept", file=sys.stderr)
            return interruption.exit_status
        except Exception as error:
            report_error(error, args)
            return 1
        finally:
            interruption.disarm()
        return 0

    return main
