"""Counts the memory and operations of a run from its options and the headers of its checkpoint, without loading or
computing.

Models, adapter, optimizer and loss are built as in the run, on fake tensors that only have shapes.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from library.collector import pause_collection
from library.data.concepts.prompt_pairs import resolve_guidance
from library.memory.blocks import BlockRunner, plain, recompute, run_encoder_layers_with
from library.memory.devices import bytes_of, tensors_of
from library.memory.formats.int8 import clear_hadamard_cache
from library.memory.frozen import frozen_layers, layers_in_blocks
from library.memory.fused import compiles_bf16, compiles_for, count_fused
from library.memory.offload.encoders import least_bytes
from library.memory.offload.streamed import choose_blocks
from library.memory.pinned import rounded_size
from library.memory.planner.fakes import emulate_cuda_norms
from library.memory.planner.prediction import CountedStep, GradientlessPasses
from library.memory.planner.repeats import Repeats, shorten_runs
from library.memory.planner.stages import Stage, max_images
from library.memory.planner.steps import (
    CountedOptimizer,
    CountedPass,
    DifferentInputs,
    Timeline,
    count_optimizer,
    count_pass,
)
from library.memory.planner.weights import ModelWeights
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.network import NetworkOptions
from library.options.training.optimizer import OptimizerOptions
from library.options.training.pairs import PairOptions
from library.options.training.run import RunOptions
from library.progress import progress_bar
from library.protocols import Architecture, TextCacheSpec
from library.randomness import generator_for
from library.training.loop.stacked_step import compute_stacked_losses
from library.training.models.base_model import LoadedModels
from library.training.models.block_running import cast_factors_of
from library.training.models.frozen_base import count_offloaded_blocks, most_offloaded
from library.training.models.preflight import mute_logging
from library.training.models.requests import RequestedRun
from library.training.models.step_context import step_context
from library.training.optimization.optimizers import build_optimizer
from library.training.planning.meta_run import (
    CPU,
    BatchShape,
    MetaRun,
    counter_for,
    fake_batch,
    has_latents,
    longest_caption,
    run_on_meta_device,
)
from library.training.planning.previews import CountedPreview, count_preview
from library.training.step.context import StepContext
from library.training.step.joining import repeat_batch
from library.training.step.losses import loss_of
from library.types import Batch, CaptionWithImages, Conditioning
from networks.core.protocol import AdoptedNetwork, Multiplexer, multiplex

T = TypeVar("T")

NUM_ASKED = 3  # prompts per training target of prompt training
NUM_COUNTS = 5  # models, encoding, a pass, a recomputed pass, the optimizer


@dataclass(frozen=True)
class CountedRun:
    """The memory and time that the parts of a run need."""

    options: TrainOptions  # of the base model, the data and the loop
    batch: BatchShape  # the largest
    step: CountedStep
    stages: tuple[Stage, ...]  # before training, one after another, each freeing its memory
    preview: CountedPreview | None = None  # during training


def count_run(run: RequestedRun, batch: BatchShape, device: torch.device, is_fused: bool | None = None) -> CountedRun:
    """Count a run on `device` whose largest batch is `batch`. Raises UserError as the run's set-up would.

    `is_fused` says whether a GPU that is not in this machine fuses operations; None asks this machine's, if it has one.
    The dropout of several adapters that share the base model is ignored.
    """
    options, arch = run.options, run.arch
    with (
        progress_bar("counting memory…", NUM_COUNTS, leave=False) as bar,
        mute_logging(),
        pause_collection(),  # looking for cycles takes an eighth of the time, and counts depend on when it happens
        # Building the adapter draws from the global generator, whose state the run needs unchanged.
        torch.random.fork_rng(devices=[]),
        clear_hadamard_cache(),
        FakeTensorMode(allow_non_fake_inputs=True),
        # Fakes are CPU tensors, and autocast treats norms there otherwise than on a GPU.
        nullcontext() if device.type == "cpu" else emulate_cuda_norms(),
        count_fused() if has_fused_kernels(device, options, is_fused) else nullcontext(),
    ):
        meta = run_on_meta_device(run, batch.num_tokens)
        bar.update(1)
        inputs = count_inputs(meta, batch)
        caches_latents = has_latents(options.caching, options.concepts)
        preview = count_preview(options.preview, arch, meta.vae, not caches_latents, counter_for(arch))
        bar.update(1)
        fake = fake_batch(arch, inputs.rows, inputs.conditioning, caches_latents)
        timeline = count_some_blocks(
            arch.chains(meta.models.denoiser),
            lambda repeats: count_step(meta, fake, repeats, partial(bar.update, 1)),
        )
        optimizer = add_optimizers(
            [
                count_update(o.optimizer, o.network, bool(o.averaging.ema_decay), arch, network)
                for o, network in zip((adapter.options for adapter in run.adapters), meta.networks, strict=True)
            ]
        )
        bar.update(1)
    step = build_step(meta, fake, timeline, optimizer, inputs.gradientless)
    return CountedRun(options, batch, step, inputs.stages, preview)


def has_fused_kernels(device: torch.device, options: TrainOptions, is_fused: bool | None) -> bool:
    """Return True if fused operations are one kernel each on `device`."""
    if options.diagnostics.deterministic or options.kernels.no_fused_operations or device.type != "cuda":
        return False
    if is_fused is not None or not torch.cuda.is_available():
        return is_fused is not False
    return compiles_for(device) and (options.precision.mixed_precision != "bf16" or compiles_bf16(device))


@dataclass(frozen=True)
class CountedInputs:
    """The rows and text features that a pass gets, and what is computed to prepare them."""

    rows: BatchShape
    conditioning: Conditioning | None
    gradientless: GradientlessPasses | None = None  # before each pass
    stages: tuple[Stage, ...] = ()  # before training


def count_inputs(meta: MetaRun, batch: BatchShape) -> CountedInputs:
    """Count what prepares the passes of the largest batch."""
    options, spec = meta.run.options, meta.run.text.cached
    rows = rows_of_pass(options.pairs, batch)
    if options.concepts is not None:
        return CountedInputs(rows, *count_prompts(options.concepts, meta, batch))
    images = count_images(meta.arch, meta.vae, batch) if options.caching.cache_latents and meta.vae else None
    captions, conditioning = count_captions(spec, meta, rows)
    if spec is not None and spec.places_key is not None and conditioning is not None:
        no_places = torch.zeros(rows.count, len(rows.reference_sizes), dtype=torch.long)
        conditioning = {**conditioning, spec.places_key: no_places}
    gradientless = None
    if options.pairs.preference_loss is not None:
        # A preference loss needs one prediction of the base model alone for each image.
        features = encode_longest(meta, rows.count) if conditioning is None else conditioning
        gradientless = GradientlessPasses(1, 1, count_prediction(meta, rows, features))
    return CountedInputs(rows, conditioning, gradientless, tuple(filter(None, (images, captions))))


def build_step(
    meta: MetaRun,
    batch: Batch,
    timeline: Timeline,
    optimizer: CountedOptimizer,
    gradientless: GradientlessPasses | None,
) -> CountedStep:
    options, denoiser, networks = meta.run.options, meta.models.denoiser, meta.networks
    text_cache = meta.arch.text_cache
    # Layers of trained text encoders are in the timeline too, but only the denoiser's blocks can be offloaded.
    denoiser_modules = set(denoiser.modules())
    places = [place for place, block in enumerate(timeline.blocks) if block in denoiser_modules]
    blocks = [timeline.blocks[place] for place in places]
    gradients = sum(p.nbytes for network in networks for p in network.trainable_parameters())
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


def rows_of_pass(pairs: PairOptions, batch: BatchShape) -> BatchShape:
    """Return what one pass computes: both images of preference pairs, or one side of a slider's pairs."""
    if not pairs.are_trained:
        return batch
    count = batch.count if pairs.preference_loss is None else 2 * batch.count
    return replace(batch, count=count, reference_sizes=())


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


def count_rise(
    arch: Architecture,
    models: Sequence[nn.Module],
    run: Callable[[], T],
    inputs: Sequence[Tensor] = (),
    num_tokens: int | None = None,
) -> tuple[int, T]:
    """Run `run` and return the peak bytes that it takes beyond the weights of `models` and the `inputs`, with its
    result."""
    counter = counter_for(arch, num_tokens)
    counter.leave_out([*tensors_of(*models), *inputs])
    with counter, torch.no_grad():
        result = run()
    return counter.peak, result


def count_images(arch: Architecture, vae: nn.Module, shape: BatchShape) -> Stage:
    """Count encoding the largest images with their references before training."""
    # A reference may be larger than its image.
    width, height = max(((shape.width, shape.height), *shape.reference_sizes), key=prod)
    pixels_BCHW = torch.empty(1, 3, height, width)
    generators = [generator_for(0, "planned")]
    bytes_of_one, _ = count_rise(arch, [vae], lambda: arch.codec.encode(vae, pixels_BCHW, generators))
    max_batch = max_images(width * height)
    return Stage("encoding images", "vae_batch_size", bytes_of(vae), bytes_of_one, bytes_of_one, most=max_batch)


def count_captions(
    spec: TextCacheSpec | None, meta: MetaRun, batch: BatchShape
) -> tuple[Stage | None, Conditioning | None]:
    """Count encoding captions before training, with the reference images that the encoders see. Return the features
    of a batch too; None if no `spec` caches them."""
    if spec is None:
        return None, None
    arch, encoders, batch_size = meta.arch, meta.encoders, batch.count
    caption, sees_images = longest_caption(arch, meta.num_tokens), spec.sees_images and len(batch.reference_sizes) > 0
    if sees_images:
        channels = 4 if arch.codec.spec.has_alpha else 3
        sizes = batch.reference_sizes
        caption = CaptionWithImages(caption, "", lambda: tuple(torch.zeros(channels, h, w) for w, h in sizes))

    def encode(count: int) -> tuple[int, Conditioning]:
        # Which tokens represent images depends on token values, so the fake mode must be off.
        with unset_fake_temporarily() if sees_images else nullcontext():
            tokens = arch.text.tokenize([caption] * count)

            def run() -> Conditioning:
                with meta.compute.autocast():
                    return arch.text.encode(encoders, tokens)

            return count_rise(arch, encoders, run, list(chain.from_iterable(tokens.images)), meta.num_tokens)

    counted = {count: encode(count) for count in {1, batch_size}}
    bytes_of_one, all_of_batch = counted[1][0], counted[batch_size][0]
    # Encoding the negative texts as well would take a twentieth of the whole count; captions need at least as much.
    each_more = bytes_of_one if batch_size == 1 else (all_of_batch - bytes_of_one) // (batch_size - 1)
    features = {name: tensor for name, tensor in counted[batch_size][1].items() if name in spec.keys}
    if spec.options.text_encoder_cpu:
        return None, features
    weights, streamed = bytes_of(*encoders), least_bytes(encoders)
    return Stage("encoding captions", "text_encoder_batch_size", weights, bytes_of_one, each_more, streamed), features


def count_prompts(
    concepts: ConceptOptions, meta: MetaRun, shape: BatchShape
) -> tuple[Conditioning, GradientlessPasses]:
    """Count the work of prompt training before the forward and backward pass: drawing latents (half of the steps on
    average) and three predictions of the base model. Return a batch's text features too."""
    num_guided = 1 if resolve_guidance(concepts, meta.arch.preview.defaults) == 1 else 2
    rows = replace(shape, count=NUM_ASKED * shape.count)
    features = encode_longest(meta, rows.count)
    peak = count_prediction(meta, rows, features)
    num_steps = concepts.max_denoising_steps / 2
    passes = GradientlessPasses(num_steps + 1, num_guided * num_steps + NUM_ASKED, peak)
    return {name: tensor[: shape.count] for name, tensor in features.items()}, passes


def encode_longest(meta: MetaRun, count: int) -> Conditioning:
    """Return the text features of the longest captions, in the active fake mode."""
    text, captions = meta.arch.text, [longest_caption(meta.arch, meta.num_tokens)] * count
    with counter_for(meta.arch, meta.num_tokens), torch.no_grad(), meta.compute.autocast():
        return text.encode(meta.encoders, text.tokenize(captions))


def count_prediction(meta: MetaRun, rows: BatchShape, features: Conditioning) -> int:
    """Return the peak bytes of a denoiser call without gradients for these images, excluding weights."""
    arch, batch = meta.arch, fake_batch(meta.arch, rows, features, True)
    assert batch.latents_BCHW is not None
    clean_BCHW = batch.latents_BCHW

    def predict() -> Tensor:
        with meta.compute.autocast():
            noised = arch.objective.corrupt(clean_BCHW, generator_for(0, "planned"))
            return arch.predict(meta.models.denoiser, noised, features, batch)

    return count_rise(arch, [meta.models.denoiser, *meta.adapter_modules], predict, (), meta.num_tokens)[0]


def count_step(meta: MetaRun, batch: Batch, repeats: Repeats, advance: Callable[[], None]) -> Timeline:
    """Count a forward and backward pass, once with all blocks recomputed and once with none; gradients exist already
    if a step has several passes. `advance` is called after each."""
    options, arch, models, networks = meta.run.options, meta.arch, meta.models, meta.networks
    multiplexer = multiplex(networks, meta.run.adapters[0].module.name) if len(networks) > 1 else None
    contexts = build_contexts(meta, multiplexer)
    cast_factors_of(networks, arch.stacks(models.denoiser))
    seeds = dict.fromkeys(range(len(networks)), 0)
    sizes = [sum(p.numel() for p in network.trainable_parameters()) for network in networks]
    # With prompts and pairs, adapters run one after another; the largest is counted.
    runs_alone = options.concepts is not None or options.pairs.are_trained
    counted_index = sizes.index(max(sizes)) if runs_alone else None
    num_passes = 2 if passes_accumulate(options.run, options.pairs) else 1

    def give_runner(runner: BlockRunner) -> None:
        arch.run_blocks_with(models.denoiser, runner)
        for encoder in models.text_encoders if options.trains_text_encoders else []:
            run_encoder_layers_with(encoder, runner)

    def activate_adapters() -> AbstractContextManager[None]:
        if multiplexer is None:
            return nullcontext()
        return (
            multiplexer.together(seeds, CPU, has_own_streams=False)
            if counted_index is None
            else multiplexer.only(counted_index)
        )

    def loss() -> Tensor:
        if multiplexer is None or counted_index is not None:
            return loss_of(contexts[counted_index or 0], batch, 0)
        losses = compute_stacked_losses(contexts, batch, repeat_batch(batch, len(contexts)), 0)
        return torch.stack(list(losses)).sum()

    def count(runner: BlockRunner) -> CountedPass:
        # As at the start of a step; the count before this one has left gradients.
        for parameter in (p for network in networks for p in network.trainable_parameters()):
            parameter.grad = None
        counter = counter_for(arch, meta.num_tokens)
        staying = [models.denoiser, *models.text_encoders, *meta.adapter_modules]
        counter.leave_out(tensors_of(*staying, *([] if models.vae is None else [models.vae])))
        for network in networks:
            network.start_step(*models.network_view)
            network.start_optimizer_step(0, 0)
        with activate_adapters():
            counted = count_pass(loss, give_runner, runner, counter, num_passes)
        advance()
        return counted

    # From these two the planner composes every choice of recomputed blocks.
    return Timeline.build(count(plain), count(recompute), repeats)


def build_contexts(meta: MetaRun, multiplexer: Multiplexer | None) -> list[StepContext]:
    options, loaded = meta.run.options, LoadedModels(meta.models, meta.run.text.live, None)
    trains_text, size = options.trains_text_encoders, options.caching.vae_batch_size
    return [
        step_context(
            trains_text,
            size,
            meta.arch,
            0,
            loaded,
            network,
            meta.compute,
            nullcontext if multiplexer is None else partial(multiplexer.only, i),
        )
        for i, network in enumerate(meta.networks)
    ]


def add_optimizers(optimizers: Sequence[CountedOptimizer]) -> CountedOptimizer:
    """Add up optimizers that step one after another."""
    # What an optimizer takes only during its step is free again when the next one steps.
    states = sum(optimizer.state for optimizer in optimizers)
    return CountedOptimizer(states, states + max(optimizer.rise - optimizer.state for optimizer in optimizers))


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
