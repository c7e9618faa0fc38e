"""Compares a convention with the pipeline itself. A wrong sign, scale, shift, packing, level, target or a forgotten
text tensor shows in at least one of four errors."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.any_pipeline.conditioning import capture_text, fill_arguments, text_of
from library.architectures.any_pipeline.convention import PROMPTS, Convention, level_error, targets_of
from library.architectures.any_pipeline.maps import SizeMaps, answer_with, read_level_values, read_maps
from library.architectures.any_pipeline.trees import (
    Path,
    copy_tensors,
    float_tensors,
    join_rows,
    join_values,
    split_rows,
)
from library.architectures.any_pipeline.watch import Answers, Refused, Trace, Watched, copy_scheduler, replace_sample

Errors = Mapping[str, float]
TOLERANCE = 1e-4  # of float32
PROMPT = "a small red bird, sitting"
NUM_STEPS = 4  # 3 would put levels that are not shifted on whole numbers, where rounding decides what is cut
NUM_OTHER_STEPS = 53  # whose levels lie between those of measurements


def require_exact(errors: Errors) -> None:
    """Raise Refused naming the errors above the tolerance."""
    if large := [f"{name} {value:.2g}" for name, value in errors.items() if not value <= TOLERANCE]:
        raise Refused(
            f"what was measured differs from what the pipeline does, in {', '.join(large)} (at most {TOLERANCE:g} is "
            "accepted)"
        )


@torch.no_grad()
def check(watched: Watched, convention: Convention, maps: SizeMaps) -> Errors:
    """Return the largest difference of each comparison, relative to the largest value. All models are in memory.

    latents: (a) the latents of an image, put in as the last sample, against what the VAE is given
    prediction: (b) our prediction at the pipeline's steps against what its scheduler got
    own mix: (c) the same for our own mix, with text and geometry of other drawings
    levels: what the denoiser is told at levels between those that were measured
    step: (d) one step of its scheduler from our mix against our mix at the next level
    """
    c, (height, width) = convention, convention.size
    own = watched.draw(PROMPT, c.size, steps=NUM_STEPS, **c.extra)
    errors = {"latents": compare_latents(watched, c, maps, own.pixel_shape[1])}
    texts = [text_of(c, call.kwargs) for call in own.calls]
    errors["prediction"] = max(compare(watched, c, maps, own, step, text) for step, text in enumerate(texts))
    shapes = (height, 2 * width), (2 * height, width)
    errors["own mix"] = max(compare_own_mix(watched, c, read_maps(watched, c, shape)) for shape in shapes)
    return {**errors, "levels": compare_levels(watched, c, maps), "step": compare_step(c, own)}


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    # Angles of rotary embeddings may be complex numbers.
    actual, expected = (torch.view_as_real(x) if x.is_complex() else x for x in (actual.cpu(), expected.cpu()))
    actual, expected = actual.float(), expected.float()
    return float((actual.reshape(expected.shape) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def compare_latents(watched: Watched, convention: Convention, maps: SizeMaps, num_channels: int) -> float:
    c, decode = convention, maps.decode
    pixels = torch.rand(1, num_channels, *c.size, generator=torch.Generator().manual_seed(9)) * 2 - 1
    raw = encode_raw(watched.models[watched.vae], pixels, len(c.latent_shape)).cpu()
    if raw.shape != decode.shape:
        raise Refused(f"the VAE encodes to the shape {tuple(raw.shape)} and decodes {decode.shape}")
    latents_BM = (raw.flatten()[None] - decode.offset_M) / decode.scale_M
    sample = maps.to_sample(latents_BM).reshape(maps.sample_shape)
    trace = watched.draw(PROMPT, c.size, Answers(samples=partial(replace_sample, sample)), **c.extra)
    return difference(trace.decoded[0], raw)


def encode_raw(vae: nn.Module, pixels_BCHW: Tensor, num_axes: int, noises: Tensor | None = None) -> Tensor:
    """Return the latents that a VAE gives, float32: the posterior's mean, plus its deviation times `noises`.

    A VAE of videos, with five axes, gets one frame.
    """
    pixels, model = pixels_BCHW.to(next(iter(vae.parameters()))), vae
    encoded = model.encode(pixels.unsqueeze(2) if num_axes == 5 else pixels)  # type: ignore[operator]
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        latents: Tensor = encoded[0].float()
        return latents
    mean: Tensor = posterior.mode().float()
    return mean if noises is None else mean + posterior.std.float() * noises.to(mean).reshape(mean.shape)


def compare(
    watched: Watched, convention: Convention, maps: SizeMaps, trace: Trace, step: int, text: Mapping[Path, Any]
) -> float:
    """Return the error of our prediction at one step of a drawing, with a captured text."""
    sample_N, level_1 = trace.steps[step].sample.flatten().float(), torch.tensor([convention.level_of(trace, step)])
    kwargs = fill_arguments(convention, maps, text, sample_N, level_1)
    torch.manual_seed(0)  # adapters may drop values, the same ones in both passes
    output = watched.call_model(convention.denoiser, "", ((), kwargs))
    return difference(maps.out(join_values(output)[None]), trace.steps[step].output)


def compare_own_mix(watched: Watched, convention: Convention, maps: SizeMaps) -> float:
    """Return the error of our prediction for our own mix, with text and geometry of other drawings.

    The denoiser runs twice, at the size of the maps.
    """
    c, size = convention, maps.size
    levels = watched.draw(PROMPT, size, answer_with(maps.template), steps=NUM_STEPS, **c.extra)
    signal, share = c.weights_of(levels, 1)
    latents, noise = torch.randn(2, *maps.sample_shape, generator=torch.Generator().manual_seed(9))
    mixed = signal * latents + share * noise

    def answer(place: int) -> Any:
        torch.manual_seed(0)
        return copy_tensors(maps.template) if place == 0 else None

    answers = Answers(answer, partial(replace_sample, mixed), stops_at=2)
    trace = watched.draw(PROMPT, size, answers, steps=NUM_STEPS, **c.extra)
    return compare(watched, c, maps, trace, 1, capture_text(watched, c, PROMPT))


def compare_levels(watched: Watched, convention: Convention, maps: SizeMaps) -> float:
    """Return the error of what the denoiser is told at the levels of a drawing with another number of steps."""
    levels, given = read_level_values(watched, convention, maps.size, maps.template, NUM_OTHER_STEPS)
    lines, tables = convention.lines, maps.tables
    return max(level_error(lines.get(path) or tables[path], levels, values) for path, values in given.items())


def compare_step(convention: Convention, trace: Trace) -> float:
    (a, b), (a2, b2) = (convention.weights_of(trace, step) for step in (0, 1))
    latents, noise = torch.randn(2, *trace.steps[0].sample.shape, generator=torch.Generator().manual_seed(7))
    target = targets_of(latents, noise, a, b)[convention.target]
    out = copy_scheduler(trace.scheduler).step(target, trace.steps[0].timestep, a * latents + b * noise)
    return difference(float_tensors(out)[0], a2 * latents + b2 * noise)


@torch.no_grad()
def gives_same_in_batch(
    watched: Watched, convention: Convention, maps: SizeMaps, prompts: Sequence[str] = (PROMPT, PROMPT)
) -> bool:
    """Return True if the denoiser gives two samples at two levels in one call what it gives them alone.

    Shorter captions are padded.
    """
    c = convention
    trace = watched.draw(PROMPTS[0], c.size, answer_with(maps.template), steps=NUM_STEPS, **c.extra)
    samples = torch.randn(2, maps.into.num_source, generator=torch.Generator().manual_seed(11))
    rows = [
        fill_arguments(c, maps, capture_text(watched, c, prompt), sample_N, torch.tensor([c.level_of(trace, step)]))
        for step, (prompt, sample_N) in enumerate(zip(prompts, samples, strict=True))
    ]
    alone = [join_values(watched.call_model(c.denoiser, "", ((), row))) for row in rows]
    try:
        output = watched.call_model(c.denoiser, "", ((), join_rows(rows, maps.kwargs, pads=True)))
        pairs = [[maps.out(values[None]) for values in pair] for pair in zip(split_rows(output, 2), alone, strict=True)]
    except Exception:  # a denoiser for one sample at a time fails in its own way
        return False
    return all(difference(*pair) <= TOLERANCE for pair in pairs)
