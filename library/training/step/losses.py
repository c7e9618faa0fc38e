"""One batch of training, from latents to the loss."""

import random
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from library.base.errors import about
from library.base.randomness import generator_for, stream_seed
from library.data.description.preservation import PRESERVATION, read_preservation
from library.data.description.schema import level_offset
from library.diffusion.timesteps import NUM_TIMESTEPS, stratify
from library.memory.devices import send
from library.protocols import Objective
from library.training.step.concepts import build_prompt, compute_target, draw_partly
from library.training.step.context import StepContext
from library.training.step.guided import prepare_guidance_loss
from library.training.step.joining import join_noised
from library.training.step.latents import build_image_features, load_latents
from library.training.step.masks import compute_masked_means
from library.training.step.pairs import losses_of_pairs, prefers, split_pairs
from library.training.step.text_features import build_conditioning
from library.types import Batch, Conditioning, Noised


def start_batch(context: StepContext, batch_number: int, step: int) -> None:
    """Seed the global random generators for this batch and notify the adapters.

    `step` is the number of finished optimizer steps.
    """
    seed = stream_seed(context.seed, "step", batch_number)
    # torch's dropout and third-party networks draw from the global generators.
    torch.manual_seed(seed)
    random.seed(seed)
    # numpy takes seeds of 32 bits; those of `stream_seed` have 63.
    np.random.seed(seed % 2**32)
    context.network.start_step(*context.models.network_view)
    context.network.start_optimizer_step(context.seed, step)


def add_noise_to(context: StepContext, batch: Batch, batch_number: int, is_checked: bool = True) -> Noised:
    """Add noise to the batch's latents; for prompts without images, denoise latents with the adapted model instead.

    Raises UserError like `load_latents` if `is_checked`.
    """
    if batch.concept is not None:
        return draw_partly(context, batch, batch.concept, batch_number)

    def seed_generator(place: int) -> torch.Generator:
        return generator_for(context.seed, "vae", batch_number, place)

    latents_BCHW = load_latents(context, batch, seed_generator, is_checked)
    clean_BCHW = context.arch.codec.normalize(latents_BCHW)
    generator = generator_for(context.seed, "noise", batch_number)
    objective, B = context.arch.objective, len(clean_BCHW)
    offsets_B = torch.tensor([level_offset(attributes) for attributes in batch.attributes])
    uniforms_B = None
    if objective.num_strata > 1:
        uniforms_B = stratify(objective.num_strata, context.seed, batch_number * B, B)
    noised = objective.corrupt(clean_BCHW, generator, offsets_B if offsets_B.any() else None, uniforms_B)
    return move_to_few_levels(context, batch, noised, batch_number)


def move_to_few_levels(context: StepContext, batch: Batch, noised: Noised, batch_number: int) -> Noised:
    """Move preserved samples with `num_steps` to noise levels at which previews of so many steps call the denoiser."""
    preserved = [read_preservation(attributes) for attributes in batch.attributes]
    if not any(one is not None and one.num_steps for one in preserved):
        return noised
    parts = []
    for place, one in enumerate(preserved):
        part = Noised(*(getattr(noised, f.name)[place : place + 1] for f in fields(Noised)))
        if one is not None and one.num_steps is not None:
            generator = generator_for(context.seed, "preserved", batch_number, place)
            objective = context.arch.objective.at_timestep(draw_level(context, batch, one.num_steps, generator))
            part = objective.corrupt(part.clean_BCHW, generator)
        parts.append(part)
    return join_noised(parts)


def draw_level(context: StepContext, batch: Batch, num_steps: int, generator: torch.Generator) -> int:
    """Draw one of the noise levels of a preview of this size, in thousandths, 0..999."""
    defaults = context.arch.preview.defaults
    prompt = replace(build_prompt(context, batch, "", num_steps, defaults.scale), sampler=defaults.sampler)
    levels = context.arch.preview.sampler(prompt).levels
    level = levels[int(torch.randint(len(levels), (1,), generator=generator))]
    return min(round(level.timestep), NUM_TIMESTEPS - 1)


def weights_of(batch: Batch) -> Tensor:
    """Return the weight of each sample's loss, with that of its preservation if all of it is preserved."""
    preserved = (read_preservation(attributes) for attributes in batch.attributes)
    weights = [1.0 if one is None or one.outside_mask else one.weight for one in preserved]
    return batch.loss_weights_B if set(weights) == {1.0} else batch.loss_weights_B * torch.tensor(weights)


def loss_of(context: StepContext, batch: Batch, batch_number: int) -> Tensor:
    """Return the loss of a batch, a scalar with gradient. All randomness is a function of the seed and `batch_number`.

    NaN latents give a NaN loss; `add_noise_to` raises the error that names the VAE.
    """
    if prefers(context, batch):
        noised_sides = [add_noise_to(context, side, batch_number, is_checked=False) for side in split_pairs(batch)]
        condition_pairs = partial(encode_varied, context, batch_number, {}, batch)
        losses_B = losses_of_pairs(context, context.arch.objective, batch, noised_sides, condition_pairs)
        return (losses_B * send(batch.loss_weights_B, losses_B.device)).mean()
    noised = add_noise_to(context, batch, batch_number, is_checked=False)
    extra = build_image_features(context, batch, context.seed, lambda place: ("batch", batch_number, place))
    condition = partial(encode_varied, context, batch_number, extra)
    losses_B = compute_losses(context, context.arch.objective, batch, noised, condition)
    return (losses_B * send(weights_of(batch), losses_B.device)).mean()


def compute_losses(
    context: StepContext, objective: Objective, batch: Batch, noised: Noised, condition: Callable[[Batch], Conditioning]
) -> Tensor:
    """Return the loss of each sample, shape B, masked but without subset weights. `condition` returns the text
    conditioning of a batch."""
    if batch.concept is not None:  # first, while no activations are kept for the backward pass
        target_BCHW = compute_target(context, batch, batch.concept, noised)
    undo_guidance = prepare_guidance_loss(context, objective, batch, noised, condition)
    with context.autocast():
        conditioning = condition(batch)
        context.network.set_noise_levels(objective.noise_levels(noised))
        output_BCHW = context.arch.predict(context.models.denoiser, noised, conditioning, batch)
        if undo_guidance is not None:
            output_BCHW = undo_guidance(output_BCHW)
        prediction_BCHW = output_BCHW if batch.concept is not None else objective.estimate(output_BCHW, noised)
    if batch.concept is not None:
        return compute_masked_means(objective.loss(prediction_BCHW, target_BCHW, noised), batch.masks_B1HW)
    target_BCHW = objective.target(noised)
    base_BCHW = predict_base(context, objective, batch, noised, condition, conditioning)
    if base_BCHW is None:
        return compute_masked_means(objective.loss(prediction_BCHW, target_BCHW, noised), batch.masks_B1HW)
    base_BCHW = base_BCHW.to(target_BCHW.dtype)
    preserved = [read_preservation(attributes) for attributes in batch.attributes]
    is_whole = [one is not None and not one.outside_mask for one in preserved]
    is_whole_B111 = send(torch.tensor(is_whole), target_BCHW.device).view(-1, 1, 1, 1)
    target_BCHW = torch.where(is_whole_B111, base_BCHW, target_BCHW)
    losses_B = compute_masked_means(objective.loss(prediction_BCHW, target_BCHW, noised), batch.masks_B1HW)
    outside = [one.weight if one is not None and one.outside_mask else 0.0 for one in preserved]
    if any(outside) and batch.masks_B1HW is not None:
        outside_BCHW = objective.loss(prediction_BCHW, base_BCHW, noised)
        outside_B = compute_masked_means(outside_BCHW, 1 - batch.masks_B1HW)
        losses_B = losses_B + send(torch.tensor(outside), losses_B.device) * outside_B
    return losses_B


def describe_shape(batch: Batch) -> str:
    """Describe the number and the size of a batch's images, for messages."""
    height, width = batch.height_width
    return f"{len(batch.keys)} images of {width}x{height}"


def encode_varied(context: StepContext, batch_number: int, extra: Conditioning, batch: Batch) -> Conditioning:
    """Build the text conditioning and apply the base model's training-time variation, such as a dropped text encoder.

    Prompts without images are not varied, because their targets use the same features.
    """
    if batch.concept is not None:
        return build_conditioning(context, batch, extra)
    return vary(context, build_conditioning(context, batch, extra), batch_number)


def vary(context: StepContext, conditioning: Conditioning, batch_number: int) -> Conditioning:
    """Apply the base model's training-time variation of text conditioning, if it has one."""
    if context.arch.vary is None:
        return conditioning
    return context.arch.vary(conditioning, generator_for(context.seed, "conditioning", batch_number))


def predict_base(
    context: StepContext,
    objective: Objective,
    batch: Batch,
    noised: Noised,
    condition: Callable[[Batch], Conditioning],
    conditioning: Conditioning,
) -> Tensor | None:
    """Return the prediction of the model without its adapter, for differential output preservation; None if no sample
    is marked for it."""
    is_needed = any(attributes.get(PRESERVATION) for attributes in batch.attributes)
    if not is_needed and not context.preserves_in_step:
        return None
    if context.models.sharded is not None and not context.preserves_in_step:
        raise about("--shard_base")(
            f": {PRESERVATION} in custom_attributes of a --dataset_class asks the base model alone, and the other "
            "processes do not know of it",
            "leave one of them out",
        )
    context.network.set_multiplier(0.0)
    try:
        with torch.no_grad(), context.autocast():
            # The conditioning at hand was computed with the text encoder's adapter, which has to be off as well.
            if context.trains_text_encoder:
                conditioning = condition(batch)
            output_BCHW = context.arch.predict(context.models.denoiser, noised, conditioning, batch)
            return objective.estimate(output_BCHW, noised)
    finally:
        context.network.set_multiplier(1.0)
