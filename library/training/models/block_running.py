"""Second stage of the set-up: attaches the adapter, and sets how blocks run."""

import logging
from dataclasses import replace
from itertools import chain

from torch import nn

from library.memory.activations import PinnedBudget, RecomputeFromMainMemory
from library.memory.blocks import (
    BlockRunner,
    Every,
    Stacks,
    draws_nothing,
    plain,
    recompute,
    recompute_without_randomness,
    run_encoder_layers_with,
)
from library.memory.cast_together import cast_in_blocks
from library.memory.compiled import Compiled, CompileSettings
from library.memory.offload.streamed import pinned_bytes
from library.memory.pinned import pinning_limit
from library.options.machine.compiling import CompileOptions
from library.options.machine.memory import MemoryOptions
from library.protocols import Architecture
from library.training.step.context import Models
from networks.core.protocol import AdoptedNetwork

logger = logging.getLogger(__name__)

# A CUDA graph keeps its outputs in its own memory, which the graph's next run overwrites: blocks that share a compiled
# graph would overwrite each other's outputs before the backward pass reads them.
MODES_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def choose_block_runner(
    memory: MemoryOptions,
    compiling: CompileOptions,
    trains_text_encoders: bool,
    arch: Architecture,
    models: Models,
    network: AdoptedNetwork,
) -> None:
    """Set how blocks run: plain or recomputed, compiled or not. The base model stays in evaluation mode."""
    for model in (models.denoiser, *models.text_encoders):
        # Also with recomputation, for which sd-scripts switches to training mode and so to the dropout of 0.1 in T5.
        model.eval().requires_grad_(False)
    network.module.train()
    budget = PinnedBudget(pinning_limit() - pinned_bytes(models.denoiser))
    runner = block_runner(memory, budget, repeats_itself(models.denoiser, network))
    if compiling.is_on:
        runner = Compiled(runner, compile_settings(compiling))
    arch.run_blocks_with(models.denoiser, runner)
    cast_factors_of(network, arch.stacks(models.denoiser))
    for encoder in models.text_encoders if trains_text_encoders else []:
        run_encoder_layers_with(encoder, block_runner(memory, budget, repeats_itself(encoder, network)))
    if memory.recomputes:
        network.enable_gradient_checkpointing()


def cast_factors_of(network: AdoptedNetwork, stacks: Stacks) -> None:
    """Let each block cast the factors of its adapter together, and multiply with those of one input at once."""
    cast_in_blocks(chain.from_iterable(stacks), dict(network.cast_factors()), network.joined_downs())


def compile_settings(options: CompileOptions) -> CompileSettings:
    """Return the compiler's settings; --dynamo_backend selects the backend."""
    backend = options.compile_backend if options.compile else options.dynamo_backend
    mode = MODES_WITHOUT_GRAPHS.get(options.compile_mode, options.compile_mode)
    if mode != options.compile_mode:
        logger.warning(
            "--compile_mode %s uses CUDA graphs, which fail where each block is compiled alone; compiling with mode %s",
            options.compile_mode,
            mode,
        )
    settings = CompileSettings(
        backend=backend,
        mode=None if mode == "default" else mode,
        is_dynamic=options.compile_dynamic != "false",
        needs_full_graph=options.compile_fullgraph,
    )
    limit = options.compile_cache_size_limit
    return settings if limit is None else replace(settings, most_graphs=limit)


def repeats_itself(model: nn.Module, network: AdoptedNetwork) -> bool:
    """Return True if a second run of a model's blocks gives the same values whatever the random generators' states."""
    return draws_nothing(model) and not network.draws_numbers


def block_runner(
    memory: MemoryOptions, budget: PinnedBudget | None = None, repeats_itself: bool = False
) -> BlockRunner:
    """Return how one model's blocks run; offloaded inputs are pinned within `budget`.

    Blocks that draw random numbers must not be said to repeat themselves. Each model needs its own runner, because
    every n-th block is counted.
    """
    if not memory.recomputes:
        return plain
    again = recompute_without_randomness if repeats_itself else recompute
    runner = RecomputeFromMainMemory(budget, again) if memory.offloads_inputs else again
    return Every(memory.gradient_checkpointing_every, runner) if memory.gradient_checkpointing_every > 1 else runner
