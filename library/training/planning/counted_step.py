"""Counts a step: the forward and backward passes, the optimizer, and what stays in memory beside them."""

from collections.abc import Callable, Collection, Sequence

from torch import nn

from library.memory.blocks import BlockRunner, plain, recompute, run_encoder_layers_with
from library.memory.devices import bytes_of, tensors_of
from library.memory.frozen import frozen_layers, layers_in_blocks
from library.memory.offload.streamed import choose_blocks
from library.memory.pinned import rounded_size
from library.memory.planner.prediction import CountedStep, GradientlessPasses
from library.memory.planner.repeats import Repeats, shorten_runs
from library.memory.planner.steps import (
    CountedOptimizer,
    CountedPass,
    DifferentInputs,
    Timeline,
    count_optimizer,
    count_pass,
)
from library.memory.planner.weights import ModelWeights
from library.options.training.network import NetworkOptions
from library.options.training.optimizer import OptimizerOptions
from library.options.training.pairs import PairOptions
from library.options.training.run import RunOptions
from library.protocols import Architecture
from library.training.models.base_model import LoadedModels
from library.training.models.block_running import cast_factors_of
from library.training.models.frozen_base import count_offloaded_blocks, most_offloaded
from library.training.models.step_context import step_context
from library.training.optimization.optimizers import build_optimizer
from library.training.planning.meta_run import MetaRun, counter_for
from library.training.step.losses import loss_of
from library.types import Batch
from networks.core.protocol import AdoptedNetwork


def build_step(
    meta: MetaRun,
    batch: Batch,
    timeline: Timeline,
    optimizer: CountedOptimizer,
    gradientless: GradientlessPasses | None,
) -> CountedStep:
    options, denoiser = meta.run.options, meta.models.denoiser
    text_cache = meta.arch.text_cache
    # Layers of trained text encoders are in the timeline too, but only the denoiser's blocks can be offloaded.
    denoiser_modules = set(denoiser.modules())
    places = [place for place, block in enumerate(timeline.blocks) if block in denoiser_modules]
    blocks = [timeline.blocks[place] for place in places]
    gradients = sum(p.nbytes for p in meta.network.trainable_parameters())
    stacks, indices = meta.arch.stacks(denoiser), {block: i for i, block in enumerate(blocks)}

    def offloaded_indices(num_blocks: int) -> list[int]:
        counts = count_offloaded_blocks(num_blocks, stacks)
        waiting = [
            stack[i] for stack, count in zip(stacks, counts, strict=True) for i in choose_blocks(len(stack), count)
        ]
        return [indices[block] for block in waiting]

    return CountedStep(
        timeline=timeline,
        first_block_index=places[0],
        weights=ModelWeights.of(denoiser, storable_layers(denoiser), blocks),
        encoders=tuple(ModelWeights.of(e, storable_layers(e), ()) for e in meta.models.text_encoders),
        own_formats=(options.precision.denoiser_format, options.precision.text_encoder_format),
        other_bytes=bytes_of(*filter(None, [meta.models.vae])),
        adapter_bytes=bytes_of(*meta.adapter_modules),
        gradient_bytes=gradients,
        held_gradient_bytes=gradients if passes_accumulate(options.run, options.pairs) else 0,
        optimizer=optimizer,
        offloaded_indices=offloaded_indices,
        most_offloaded=most_offloaded(stacks),
        multiplies_codes=options.precision.multiplies_codes,
        gradientless=gradientless,
        batch_bytes=count_pinned_batches(batch, () if text_cache is None else text_cache.on_host),
    )


def passes_accumulate(run: RunOptions, pairs: PairOptions) -> bool:
    """Return True if a step accumulates the gradients of several passes."""
    return run.gradient_accumulation_steps > 1 or pairs.pair_slider is not None


def count_some_blocks(chains: Sequence[nn.ModuleList], count: Callable[[Repeats], Timeline]) -> Timeline:
    """Count with few blocks that represent the rest; more if stacks built alike get inputs of different sizes."""
    try:
        with shorten_runs(chains) as repeats:
            return count(repeats)
    except DifferentInputs:
        with shorten_runs(chains, shares=False) as repeats:
            return count(repeats)


def storable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers in blocks whose weights can be stored in a weight format, including those already in 8 bits."""
    return [*layers_in_blocks(model).values(), *frozen_layers(model)]


def count_pinned_batches(batch: Batch, on_host: Collection[str]) -> int:
    """Return the bytes of pinned memory from which batches are copied: one that is computed and one ahead. Features in
    `on_host` are not copied."""
    tensors = [batch.pixels_BCHW, batch.latents_BCHW, *batch.reference_pixels, *batch.reference_latents]
    tensors += [feature for name, feature in (batch.conditioning or {}).items() if name not in on_host]
    return 2 * sum(rounded_size(tensor.nbytes) for tensor in tensors if tensor is not None)


def count_step(meta: MetaRun, batch: Batch, repeats: Repeats, advance: Callable[[], None]) -> Timeline:
    """Count a forward and backward pass, once with all blocks recomputed and once with none; gradients exist already
    if a step has several passes. `advance` is called after each."""
    options, arch, models, network = meta.run.options, meta.arch, meta.models, meta.network
    loaded = LoadedModels(models, meta.run.text.live, None)
    trains_text, vae_batch_size = options.trains_text_encoders, options.caching.vae_batch_size
    context = step_context(trains_text, vae_batch_size, arch, 0, loaded, network, meta.compute)
    cast_factors_of(network, arch.stacks(models.denoiser))
    num_passes = 2 if passes_accumulate(options.run, options.pairs) else 1

    def give_runner(runner: BlockRunner) -> None:
        arch.run_blocks_with(models.denoiser, runner)
        for encoder in models.text_encoders if options.trains_text_encoders else []:
            run_encoder_layers_with(encoder, runner)

    def count(runner: BlockRunner) -> CountedPass:
        # As at the start of a step; the count before this one has left gradients.
        for parameter in network.trainable_parameters():
            parameter.grad = None
        counter = counter_for(arch, meta.num_tokens)
        staying = [models.denoiser, *models.text_encoders, *meta.adapter_modules]
        counter.leave_out(tensors_of(*staying, *([] if models.vae is None else [models.vae])))
        network.start_step(*models.network_view)
        network.start_optimizer_step(0, 0)
        counted = count_pass(lambda: loss_of(context, batch, 0), give_runner, runner, counter, num_passes)
        advance()
        return counted

    # From these two the planner composes every choice of recomputed blocks.
    return Timeline.build(count(plain), count(recompute), repeats)


def count_update(
    optimizer: OptimizerOptions, rates: NetworkOptions, is_averaged: bool, arch: Architecture, network: AdoptedNetwork
) -> CountedOptimizer:
    """Count the state of the optimizer and of the moving average, which is float32."""
    groups, _ = network.parameter_groups(rates.text_encoder_lr, rates.unet_lr, optimizer.learning_rate)
    counted = count_optimizer(
        lambda param_groups: build_optimizer(optimizer, param_groups).optimizer, groups, counter_for(arch)
    )
    averages = 4 * sum(p.numel() for p in network.trainable_parameters()) if is_averaged else 0
    return CountedOptimizer(counted.state + averages, counted.rise + averages)
