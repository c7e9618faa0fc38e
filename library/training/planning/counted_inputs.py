"""Counts what prepares a pass: encoding images and captions before training, and predictions before each pass."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from library.base.randomness import generator_for
from library.data.concepts.prompt_pairs import resolve_guidance
from library.diffusion.references import reference_features
from library.memory.devices import bytes_of, tensors_of
from library.memory.offload.encoders import least_bytes
from library.memory.planner.prediction import GradientlessPasses
from library.memory.planner.speed import Work
from library.memory.planner.stages import StageMemory, max_images
from library.options.training.concepts import ConceptOptions
from library.options.training.pairs import PairOptions
from library.protocols import Architecture, TextCacheSpec
from library.training.planning.meta_run import BatchShape, MetaRun, counter_for, fake_batch, longest_caption
from library.training.step.conditioning import MEMO_BYTES
from library.types import CaptionWithImages, Conditioning

T = TypeVar("T")

NUM_ASKED = 3  # prompts per training target of prompt training


@dataclass(frozen=True)
class CountedInputs:
    """The rows and text features that a pass gets, and what is computed to prepare them."""

    rows: BatchShape
    conditioning: Conditioning | None
    gradientless: GradientlessPasses | None = None  # before each pass
    stages: tuple[StageMemory, ...] = ()  # before training


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
    elif options.guidance.guidance_scale_of_loss is not None:
        gradientless = count_unconditional(meta, rows, conditioning)
    return CountedInputs(rows, conditioning, gradientless, tuple(filter(None, (images, captions))))


def count_unconditional(meta: MetaRun, rows: BatchShape, conditioning: Conditioning | None) -> GradientlessPasses:
    """Count the prediction for the unconditional caption of --guidance_loss; its caption is taken to be as long as the
    longest."""
    features = encode_longest(meta, rows.count) if conditioning is None else conditioning
    spec, references = meta.arch.codec.spec, []
    for width, height in rows.reference_sizes:
        references.append(torch.empty(rows.count, spec.channels, height // spec.downscale, width // spec.downscale))
    return GradientlessPasses(1, 1, count_prediction(meta, rows, {**features, **reference_features(references)}))


def rows_of_pass(pairs: PairOptions, batch: BatchShape) -> BatchShape:
    """Return what one pass computes: both images of preference pairs, or one side of a slider's pairs."""
    if not pairs.are_trained:
        return batch
    count = batch.count if pairs.preference_loss is None else 2 * batch.count
    return replace(batch, count=count, reference_sizes=())


def count_rise(
    arch: Architecture,
    models: Sequence[nn.Module],
    run: Callable[[], T],
    inputs: Sequence[Tensor] = (),
    num_tokens: int | None = None,
) -> tuple[int, T, Work]:
    """Run `run` and return the peak bytes that it takes beyond the weights of `models` and the `inputs`, with its
    result and its work."""
    counter = counter_for(arch, num_tokens)
    counter.leave_out([*tensors_of(*models), *inputs])
    with counter, torch.no_grad():
        result = run()
    return counter.peak, result, Work(counter.flops, counter.moved, counter.launches)


def count_images(arch: Architecture, vae: nn.Module, shape: BatchShape) -> StageMemory:
    """Count encoding the largest images with their references before training."""
    # A reference may be larger than its image.
    width, height = max(((shape.width, shape.height), *shape.reference_sizes), key=prod)
    pixels_BCHW = torch.empty(1, 3, height, width)
    generators = [generator_for(0, "planned")]
    bytes_of_one, _, work = count_rise(arch, [vae], lambda: arch.codec.encode(vae, pixels_BCHW, generators))
    most = max_images(width * height)
    return StageMemory(
        "encoding images", "vae_batch_size", bytes_of(vae), bytes_of_one, bytes_of_one, most=most, work=work
    )


def count_captions(
    spec: TextCacheSpec | None, meta: MetaRun, batch: BatchShape
) -> tuple[StageMemory | None, Conditioning | None]:
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

    def encode(count: int) -> tuple[int, Conditioning, Work]:
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
    stage = StageMemory(
        "encoding captions", "text_encoder_batch_size", weights, bytes_of_one, each_more, streamed, work=counted[1][2]
    )
    return stage, features


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


def count_kept_features(meta: MetaRun, num_captions: int | None) -> int:
    """Return the bytes of the features that a run keeps of uncached captions, of an unknown number as many as it ever
    keeps."""
    options = meta.run.options
    if not meta.models.text_encoders or options.concepts is not None or options.trains_text_encoders:
        return 0
    of_one = bytes_of_features(encode_longest(meta, 1))
    return of_one * max(1, min(MEMO_BYTES // max(1, of_one), MEMO_BYTES if num_captions is None else num_captions))


def bytes_of_features(features: Conditioning) -> int:
    return sum(feature.nbytes for feature in features.values())


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
