"""tools/plan_memory.py with a training's options: what it counts in the headers of the checkpoint."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from library.architectures.specs import list_specs
from library.base.errors import about
from library.base.terminal import print_line
from library.checkpoints.base_model_spec import BaseModelSpec
from library.data.description.dataset_file import load_dataset_config, parse_numbers
from library.data.description.schema import RunDataConfig
from library.memory.planner.gpus import Gpu, fuses
from library.options.dataset import DatasetOptions
from library.options.requirements import check_requirements
from library.training.command_line.checks import check_precision
from library.training.command_line.cli import parse
from library.training.command_line.option_checks import check_multipliers, check_paths, check_values
from library.training.models.preflight import mute_logging
from library.training.models.requests import RequestedRun
from library.training.models.weight_formats import check_format
from library.training.planning.counting import CountedRun, count_run
from library.training.planning.fit import fit_to
from library.training.planning.meta_run import BatchShape
from library.training.sweep.combinations import expand_combinations

GPU = torch.device("cuda")  # the device to plan for; it need not exist
NUM_TOKENS = 300  # of a long caption in sentences; no caption is read


def spec_of_script(name: str) -> BaseModelSpec:
    """Return the base model of a training script. Raises UserError listing the scripts if there is no such script."""
    # Of several base models with one script, the first needs no flag to be selected.
    specs = {spec.script: spec for spec in reversed(list_specs())}
    script = f"{name.removesuffix('.py')}.py"
    if script not in specs:
        raise about("--script")(f"{name} is not a training script", f"use one of {', '.join(sorted(specs, key=len))}")
    return specs[script]


def read_training_options(script: str, arguments: Sequence[str]) -> tuple[BaseModelSpec, Any]:
    """Return a script's base model and its parsed training options. Raises UserError for invalid options."""
    spec = spec_of_script(script)
    parser = importlib.import_module(spec.script.removesuffix(".py")).setup_parser()
    return spec, spec.options.from_args(parse(parser, arguments))


def read_checked_options(script: str, arguments: Sequence[str]) -> tuple[BaseModelSpec, Any]:
    """Return a script's base model and its training options, checked as far as drawing and measuring need them."""
    spec, options = read_training_options(script, arguments)
    check_values(options)
    check_precision(options.precision, options.network)
    check_format(options.precision.denoiser_format)
    return spec, options


def count(name: str, arguments: Sequence[str], is_fused: bool | None = None) -> tuple[RequestedRun, CountedRun]:
    """Return a training run, and the count of its operations and memory; `is_fused` is that of `count_run`.

    Raises UserError for invalid options.
    """
    spec, options = read_training_options(name, arguments)
    if not options.network.network_module:
        raise about("--network_module", cause="missing")("is not set", "use networks.lora for a LoRA")
    if options.distributed.shard_base and not options.distributed.shard_group:
        raise about("--shard_base")(": set --shard_group to the number of processes that share the base model")
    check_requirements(options)
    check_paths(replace(options, state=replace(options.state, resume=None)))  # a plan reads no state
    check_multipliers(options.network)
    check_precision(options.precision, options.network)
    data = options.dataset
    batch = largest_batch(load_dataset_config(options)) if data.dataset_config else batch_of_options(data)
    with mute_logging():  # the training run itself logs these messages
        if options.sweep.sweep:
            runs = [combination.options for combination in expand_combinations(options)]
            options = max(runs, key=lambda own: own.network.network_dim or 0)
        run = RequestedRun.resolve(options, spec.build(options))
        return run, count_run(run, batch, GPU, is_fused)


def batch_of_options(data: DatasetOptions) -> BatchShape:
    """Return the batch of --resolution and --train_batch_size. Raises UserError if no resolution is set."""
    if not data.resolution:
        raise about("--resolution", cause="missing")("is not set", "set the training size, such as 512 or 512,768")
    sides = parse_numbers("--resolution", data.resolution, int, (1, 2), "512 or 768,512")
    return BatchShape(data.train_batch_size, sides[0], sides[-1], num_tokens=NUM_TOKENS)


def largest_batch(config: RunDataConfig) -> BatchShape:
    """Return the largest batch of a data set, whose images need not exist.

    Every bucket has at most as many pixels as the resolution; each folder of `control_dirs` counts as one reference.
    """
    shapes = [
        BatchShape(
            d.batch_size, *d.resolution, (s.control_resolution or d.resolution,) * len(s.control_dirs), NUM_TOKENS
        )
        for d in config.datasets
        for s in d.subsets
    ]
    return max(shapes, key=lambda shape: shape.num_pixels)


def plan(script: str, training: Sequence[str], gpus: Sequence[Gpu], system: str) -> None:
    """Print a table for each GPU of a machine with this system. Raises UserError for invalid options."""

    @cache
    def counts(is_fused: bool) -> tuple[RequestedRun, CountedRun]:
        return count(script, training, is_fused)

    mixed_precision = read_training_options(script, training)[1].precision.mixed_precision
    for number, gpu in enumerate(gpus):
        run, counted = counts(fuses(gpu, system, mixed_precision))
        options, batch = run.options, counted.batch
        if number == 0:
            captions = f", captions of {NUM_TOKENS} tokens" if run.arch.text.max_tokens > NUM_TOKENS else ""
            sizes = f"{batch.count} x {batch.width}x{batch.height}"
            print_line(f"{run.arch.name}, {sizes}, {options.network.network_module}{captions}")
        num_steps = options.run.max_train_steps if options.run.max_train_epochs is None else None
        print_line("")
        for line in fit_to(counted, gpu, num_steps).lines():
            print_line(line)
