"""Compares what a run trains with, at its start and at each new size of image, with what the pipeline does.

The pipeline draws with recorded outputs of its text encoders; neither they nor the VAE run. In place of the denoiser
stands a value, so the comparison of its arguments is exact; as the denoiser trains, it is called once for each size.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.any_pipeline.check import (
    NUM_STEPS,
    PROMPT,
    TOLERANCE,
    Errors,
    compare_levels,
    compare_step,
    difference,
)
from library.architectures.any_pipeline.conditioning import CapturedText, capture_text, fill_arguments
from library.architectures.any_pipeline.convention import PROMPTS, Convention, levels_of, targets_of
from library.architectures.any_pipeline.maps import CPU, SizeMaps, answer_with
from library.architectures.any_pipeline.measuring import find_unconditional
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict, Repeated
from library.architectures.any_pipeline.trees import (
    Path,
    copy_tensors,
    differing,
    fill_like,
    join_rows,
    join_values,
    leaves,
    move,
    split_rows,
)
from library.architectures.any_pipeline.watch import Answers, Refused, Size, copy_scheduler, replace_sample, setting
from library.diffusion.timesteps import NUM_TIMESTEPS, shift_sigmas
from library.options.training.noise import NoiseOptions
from library.protocols import Objective
from library.types import Conditioning, Noised

logger = logging.getLogger(__name__)

TOLERANCE_IN_16_BITS = 0.02  # of values that text encoders computed, relative to the largest
WRONG = float("inf")
TIMESTEP = NUM_TIMESTEPS // 2  # of a flow


class Echo(nn.Module):
    """Stands for the denoiser: compares its arguments with those that a pipeline gave, and returns what it returned."""

    def __init__(self, kwargs: Mapping[str, Any], output: Any, text: tuple[Path, ...]) -> None:
        super().__init__()
        self.expected, self.output, self.text = leaves(kwargs), output, text
        self.error, self.text_error = WRONG, 0.0

    def forward(self, **kwargs: Any) -> Any:
        given = leaves(kwargs)
        errors = {path: leaf_error(given.get(path), leaf) for path, leaf in self.expected.items()}
        self.error = max(error for path, error in errors.items() if path not in self.text)
        self.text_error = max(error for path, error in errors.items() if path in self.text)
        if given.keys() != self.expected.keys():
            self.error = WRONG
        return self.output


def leaf_error(actual: Any, expected: Any) -> float:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if type(actual) is type(expected) and bool(actual == expected) else WRONG
    if actual.shape != expected.shape or actual.is_floating_point() != expected.is_floating_point():
        return WRONG
    return difference(actual, expected) if expected.numel() else 0.0


@torch.no_grad()
def compare_training(predict: PipelinePredict, codec: PipelineLatents, objective: Objective) -> Errors:
    """Return the errors of what trains, for a wide and for a tall image; no model runs."""
    c, watched = predict.convention, predict.watched
    height, width = c.size
    errors: dict[str, float] = {}
    with watched.real_tensors(), torch.random.fork_rng():
        for name, size in (("wide", (height, 2 * width)), ("tall", (2 * height, width))):
            maps = predict.prepare(size, CPU)
            errors[f"the latents of a {name} image"] = compare_codec(predict, codec, maps, size)
            errors[f"the prediction of a {name} image"] = compare_prediction(predict, maps, size)
        own = watched.draw(PROMPT, c.size, answer_with(c.output), steps=NUM_STEPS, **c.extra)
        scale, channels = own.pixel_shape[-1] // own.decoded[0].shape[-1], own.pixel_shape[1]
        errors["the shape of images"] = 0.0 if (scale, channels == 4) == (c.downscale, c.has_alpha) else WRONG
        errors["a step of the scheduler"] = compare_step(c, own)
        errors["the objective"] = compare_objective(objective, c, watched.pipe.scheduler)
        errors["the noise levels of steps"] = compare_levels(watched, c, predict.prepare(c.size, CPU))
        errors["the shift of noise levels"] = compare_shift(predict) if c.mix == "flow" else 0.0
        errors["models without effect"] = compare_idle(predict)
        errors["dropped captions"] = 0.0 if find_unconditional(watched, c) == c.unconditional else WRONG
    return errors


def compare_codec(predict: PipelinePredict, codec: PipelineLatents, maps: SizeMaps, size: Size) -> float:
    """Return the error of the VAE's latents, two different ones, after they were normalized and the pipeline had them
    as the last sample."""
    c, watched, shape = predict.convention, predict.watched, maps.decode.shape
    errors = []
    for seed, scale, offset in ((9, 1.0, 0.0), (10, 3.0, -1.0)):
        raw = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
        latents_BCHW = codec.normalize(raw.reshape(shape[0], shape[1], *shape[-2:]))
        sample = maps.to_sample(latents_BCHW.flatten(1)).reshape(maps.sample_shape)
        answers = replace(answer_with(maps.template), samples=partial(replace_sample, sample))
        decoded = watched.draw(PROMPT, size, answers, **c.extra).decoded[0]
        errors += [difference(decoded, raw), difference(c.raw_of(latents_BCHW), raw)]
    return max(errors)


def compare_prediction(
    predict: PipelinePredict, maps: SizeMaps, size: Size, denoiser: nn.Module | None = None
) -> float:
    """Return the error of our prediction, and of the arguments with which it calls the denoiser.

    The denoiser runs once, for the pipeline; without it a random value stands for its output.
    """
    c, watched, device = predict.convention, predict.watched, maps.decode.scale_M.device
    generator = torch.Generator().manual_seed(9)
    shape = (maps.decode.shape[0], maps.decode.shape[1], *maps.decode.shape[-2:])
    latents = torch.randn(shape, generator=generator).to(device)
    output = fill_like(maps.template, torch.randn(len(join_values(maps.template)), generator=generator))
    sample = maps.to_sample(latents.flatten(1)).reshape(maps.sample_shape)
    answers = Answers(
        lambda place: copy_tensors(output) if place == 0 or denoiser is None else None,
        partial(replace_sample, sample),
        stops_at=2,
    )
    models = watched.models if denoiser is None else {**watched.models, c.denoiser: denoiser}
    with setting(watched, models=models):
        trace = watched.draw(PROMPT, size, answers, steps=NUM_STEPS, **c.extra)
        text = capture_text(watched, c, PROMPT)
    call, level = trace.calls[1], torch.tensor([c.level_of(trace, 1)], device=device)
    echo = Echo(call.kwargs, move(call.output, device), c.text)
    noised = Noised(latents, latents, latents, level, level)
    prediction = predict.predict(echo, maps, noised, to_conditioning(predict.text, text, device))
    error = difference(maps.to_sample(prediction.flatten(1)), trace.steps[1].output)
    # Features of captions are stored in the type of their encoders.
    rounding = 1.0 if predict.text.dtype == torch.float32 else TOLERANCE / TOLERANCE_IN_16_BITS
    return max(error, echo.error, rounding * echo.text_error)


def to_conditioning(text: CapturedText, arguments: Mapping[Path, Any], device: torch.device) -> Conditioning:
    features = text.to_features(arguments)
    return {key: value[None].to("cpu" if key in text.host_keys else device) for key, value in features.items()}


def compare_objective(objective: Any, convention: Convention, scheduler: Any) -> float:
    """Return the error of the target and of the noisy latents at one level."""
    c = convention
    timestep = TIMESTEP if c.mix == "flow" else len(scheduler.alphas_cumprod) // 2
    plain = replace(objective, noise=NoiseOptions()).at_timestep(timestep)
    generator = torch.Generator().manual_seed(5)
    clean = torch.randn(1, c.latent_shape[1], 8, 8, generator=generator)
    noised = plain.corrupt(clean, generator)
    level = timestep / NUM_TIMESTEPS if c.mix == "flow" else float(timestep)
    signal, share = c.weights_at(scheduler, level)
    mixed = signal * clean + share * noised.noise_BCHW
    target = targets_of(clean, noised.noise_BCHW, signal, share)[c.target]
    sides = difference(noised.latents_BCHW, mixed), difference(plain.estimate(target, noised), plain.target(noised))
    return max(sides)


def compare_shift(predict: PipelinePredict) -> float:
    """Return the error of the pipeline's own noise levels without their shift, shifted by ours.

    Schedules that are no shift are not compared.
    """
    config = predict.watched.pipe.scheduler.config
    if any(config.get(name) for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")):
        return 0.0
    height, width = predict.convention.size
    size = height, 2 * width
    trace = predict.draw_default(size)
    scheduler, plain = predict.watched.pipe.scheduler, copy_scheduler(predict.watched.pipe.scheduler)
    known = {"shift": 1.0, "flow_shift": 1.0, "shift_terminal": None, "use_dynamic_shifting": False}
    plain.register_to_config(**{name: value for name, value in known.items() if name in plain.config})
    if "_shift" in vars(plain):
        plain.set_shift(1.0)
    plain.set_timesteps(**{name: value for name, value in trace.schedule.items() if name != "mu"})
    sigmas, own = (levels_of(part)[:-1].double().cpu() for part in (scheduler, plain))
    if config.get("shift_terminal"):  # stretches the levels too
        own_B = shift_sigmas(own, predict.shift(size))
        stretch = (1 - own_B[-1]) / (1 - config["shift_terminal"])
        return difference(1 - (1 - own_B) / stretch, sigmas)
    return difference(shift_sigmas(own, predict.shift(size)), sigmas)


def compare_idle(predict: PipelinePredict) -> float:
    """Return 0 if the models that are called without effect have none on the denoiser and the scheduler."""
    c, watched = predict.convention, predict.watched
    if not c.idle:
        return 0.0
    given: list[Mapping[Path, Any]] = []
    for value in (0.0, 1.0):
        with setting(watched, idle_value=value):
            trace = watched.draw(PROMPT, c.size, answer_with(c.output), **c.extra)
        given.append(leaves([[call.kwargs for call in trace.calls], [step.output for step in trace.steps]]))
    return WRONG if differing(*given) else 0.0


def compare_batch(predict: PipelinePredict, denoiser: Repeated, maps: SizeMaps) -> float:
    """Return the difference between the last sample of a batch and the same sample in a batch of copies, in which it is
    not padded; 0 for a denoiser that gets one sample at a time, and where adapters drop values at random."""
    c, watched, count = predict.convention, predict.watched, denoiser.count
    if count == 1:
        return 0.0
    device = maps.decode.scale_M.device
    samples = torch.randn(2, maps.into.num_source, generator=torch.Generator().manual_seed(12)).to(device)
    trace = watched.draw(PROMPTS[0], c.size, answer_with(c.output), steps=NUM_STEPS, **c.extra)
    other, row = [
        fill_arguments(
            c, maps, predict.text.restore(to_conditioning(predict.text, text, device), 0), samples[step],
            torch.tensor([c.level_of(trace, step)], device=device),
        )
        for step, caption in enumerate((PROMPT if c.pads else PROMPTS[0], PROMPTS[0]))
        for text in (capture_text(watched, c, caption),)
    ]  # fmt: skip

    def last_of(rows: Sequence[Any], seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        output = denoiser.denoiser(**join_rows(rows, maps.kwargs, c.pads))
        return maps.out(split_rows(output, count)[-1][None].float())

    alone = last_of([row] * count)
    error = difference(last_of([*[other] * (count - 1), row]), alone)
    rounding = 1.0 if predict.text.dtype == torch.float32 else TOLERANCE / TOLERANCE_IN_16_BITS
    if rounding * error > TOLERANCE and not torch.equal(last_of([row] * count, 1), alone):
        return 0.0
    return rounding * error


@torch.no_grad()
def check_denoiser(predict: PipelinePredict, denoiser: Repeated, maps: SizeMaps, size: Size) -> None:
    """Compare the prediction of the denoiser as it trains, for one size of image, and log the result.

    Raises Refused if it differs from the pipeline's own.
    """
    begun, c = time.monotonic(), predict.convention
    try:
        with predict.watched.real_tensors(), torch.random.fork_rng():
            error = compare_prediction(predict, maps, size, denoiser)
            mixing = 0.0 if predict.ready else compare_batch(predict, denoiser, maps)
    except torch.OutOfMemoryError:
        logger.warning("too little memory to compare images of %dx%d with the pipeline; going on", *size[::-1])
        return
    if not error <= TOLERANCE:
        raise Refused(
            f"{c.pipeline}: the prediction of the loaded denoiser for images of {size[1]}x{size[0]} differs "
            f"from the pipeline's own by {error:.2g} of its largest value (at most {TOLERANCE:g} is accepted)"
        )
    if not mixing <= TOLERANCE:
        raise Refused(
            f"{c.pipeline}: in a batch of {denoiser.count} the loaded denoiser gives a sample another prediction than "
            "alone, unlike when it was measured",
            "delete the kept measurement, and start again",
        )
    logger.info(
        "the prediction for images of %dx%d agrees with the pipeline's own (%.1g), checked in %.1f s",
        *size[::-1], error, time.monotonic() - begun,
    )  # fmt: skip
