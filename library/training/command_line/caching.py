"""Commands that encode a dataset for later runs."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from library.base.errors import about
from library.base.terminal import print_line
from library.data.debug_dataset import show_batches
from library.data.plan.data_plan import DataPlan, build_plan
from library.data.sources.folders.metadata_file import MetadataEntry
from library.options.train import TrainOptions
from library.processes.process_group import from_accelerator
from library.protocols import Architecture, LatentCodec
from library.training.command_line.cli import CommandLine
from library.training.command_line.main import report_error
from library.training.failures.interruption import Interrupted, Interruption
from library.training.models.base_model import encode_images
from library.training.models.compute import Compute
from library.training.models.opening import open_accelerator, open_data_plan
from library.training.models.text_caching import TextPlan, prepare_text

logger = logging.getLogger(__name__)


def cache_images(
    options: TrainOptions,
    codec: LatentCodec,
    load_vae: Callable[[], nn.Module],
    entries: Sequence[tuple[str, MetadataEntry]] | None = None,
) -> DataPlan:
    """Encode every image whose cache file is missing or stale. Return the images with their buckets.

    `entries` is the metadata file if already read. Raises UserError.
    """
    if options.dataset.debug_dataset:
        return show_data(build_plan(options, codec.spec, options.run.seed or 0, None, None))
    processes = from_accelerator(open_accelerator(options.precision.mixed_precision))
    seed = options.run.seed or 0
    plan = build_plan(options, codec.spec, seed, None, None, processes.count, entries)
    encode_images(load_vae, codec, options.caching, seed, plan, processes)
    return plan


def cache_captions(options: TrainOptions, arch: Architecture) -> None:
    """Encode every caption whose cache file is missing or stale. Raises UserError."""
    if options.dataset.debug_dataset:
        show_data(build_plan(options, arch.codec.spec, options.run.seed or 0, None, None))
        return
    processes = from_accelerator(open_accelerator(options.precision.mixed_precision))
    compute = Compute.build(options.precision, processes.device)
    text = TextPlan.resolve(options.network, arch.text_cache)
    if text.cached is None:
        raise about("--cache_text_encoder_outputs_to_disk")(
            "has no effect here: every text encoder trains, or none can be cached", "remove it"
        )
    plan = open_data_plan(options, arch, text, options.run.seed or 0, processes.count)
    prepare_text(text, options.caching, options.precision, arch, plan, compute, [], processes)


def show_data(plan: DataPlan) -> DataPlan:
    """List the images as a training with --debug_dataset does, and encode nothing."""
    plan.audit(logger)
    show_batches(plan)
    return plan


def select_backend(text: str | None, has_cudnn: bool) -> None:
    """Make accelerate use a device, None for its own choice. Raises UserError if the device is unknown or absent."""
    torch.backends.cudnn.enabled = has_cudnn and torch.backends.cudnn.enabled
    if text is None:
        return
    try:
        torch.empty(1, device=text)
    # torch raises AssertionError where it was built without the device.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise about("--device")(f"{text} cannot be used ({reason})", "use cpu, or leave it out") from None
    os.environ["ACCELERATE_TORCH_DEVICE"] = text


def run_caching(command_line: CommandLine, action: Callable[[argparse.Namespace], object]) -> int:
    """Run a caching command. Return the exit status, 0 for success and 1 for an error."""
    interruption = Interruption()
    interruption.install()
    try:
        action(command_line.args)
    except Interrupted as error:
        print_line(f"{error} received; complete files are kept", sys.stderr)
        return interruption.exit_status
    except Exception as error:
        report_error(error, command_line)
        return 1
    finally:
        interruption.disarm()
    return 0
