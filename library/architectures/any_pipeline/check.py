"""Compares a convention with the pipeline itself. A wrong sign, scale, shift, packing, level, target or a forgotten
text tensor shows in at least one of four errors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.maps import SizeMaps
from library.architectures.any_pipeline.trees import (
    Path,
    float_tensors,
    join_values,
    leaves,
    map_leaves,
    replace_leaves,
    split_rows,
    stack_rows,
)
from library.architectures.any_pipeline.watch import (
    Answers,
    Refused,
    Trace,
    Watched,
    copy_scheduler,
    is_vae,
    next_sample,
)

TOLERANCE = 1e-4  # of float32
PROMPT = "a small red bird, sitting"
NUM_STEPS = 3


@dataclass(frozen=True)
class Errors:
    """The largest difference of each comparison, relative to the largest value."""

    latents: float  # (a) the latents of an image, put in as the last sample, against what the VAE is given
    prediction: float  # (b) our prediction at the pipeline's steps against what its scheduler got
    own_mix: float  # (c) the same for our own mix, with text and geometry of other drawings
    step: float  # (d) one step of its scheduler from our mix against our mix at the next level

    def list_large(self, tolerance: float) -> Iterator[str]:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not value <= tolerance:
                yield f"{entry.name.replace('_', ' ')} {value:.2g}"


def require_exact(errors: Errors, tolerance: float = TOLERANCE) -> None:
    """Raise Refused naming the errors above the tolerance."""
    if large := list(errors.list_large(tolerance)):
        raise Refused(
            f"what was measured differs from what the pipeline does, in {', '.join(large)} (at most {tolerance:g} is "
            "accepted)"
        )


def check(watched: Watched, convention: Convention, maps: SizeMaps, prompt: str = PROMPT) -> Errors:
    """Return the errors of a convention, whose models are in memory."""
    c = convention
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        latents, expected = encode_image(watched, c, maps, generator)
        trace = watched.draw(prompt, c.size, Answers(samples=lambda _, old: latents.to(old)), **c.extra)
        of_latents = difference(trace.decoded[0], expected)
        own = watched.draw(prompt, c.size, steps=NUM_STEPS, **c.extra)
        prediction = max(compare(watched, c, maps, own, step, None) for step in range(len(own.steps)))
        noise = torch.randn(maps.sample_shape, generator=generator)
        own_mix = compare_own_mix(watched, c, maps, latents, noise, prompt)
        return Errors(of_latents, prediction, own_mix, compare_step(c, own, latents, noise))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    actual, expected = actual.float().cpu(), expected.float().cpu()
    return float((actual.reshape(expected.shape) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def encode_image(
    watched: Watched, convention: Convention, maps: SizeMaps, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a random image as the scheduler's sample, and what the VAE's decoder has to get for it."""
    image = torch.rand(1, convention.pixel_shape[1], *convention.size, generator=generator) * 2 - 1
    raw = encode_raw(watched.models[watched.vae], image, len(convention.pixel_shape))
    if raw.shape != maps.decode.shape:
        raise Refused(f"the VAE encodes to the shape {tuple(raw.shape)} and decodes {maps.decode.shape}")
    return maps.encode()(raw.flatten()[None]).reshape(maps.sample_shape), raw


def encode_raw(vae: nn.Module, pixels_BCHW: Tensor, num_axes: int, noises: Tensor | None = None) -> Tensor:
    """Return the latents that a VAE gives, float32: the posterior's mean, plus its deviation times `noises`.

    A VAE of videos, with five axes, gets one frame.
    """
    assert is_vae(vae)
    like, model = next(iter(vae.parameters())), vae
    pixels = pixels_BCHW.to(like.device, like.dtype)
    encoded: Any = model.encode(pixels.unsqueeze(2) if num_axes == 5 else pixels)  # type: ignore[operator]
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        return float_tensors(encoded if isinstance(encoded, tuple | dict) else [encoded.latent])[0].float()
    mean: Tensor = posterior.mode().float()
    return mean if noises is None else mean + posterior.std.float() * noises.to(mean).reshape(mean.shape)


def compare(watched: Watched, convention: Convention, maps: SizeMaps, trace: Trace, step: int, kwargs: Any) -> float:
    """Return the error of our prediction at one step of a drawing, with its own arguments or with `kwargs`."""
    c, own = convention, trace.calls[convention.call + convention.calls_per_step * step].kwargs
    sample, level = trace.steps[step].sample, c.level_of(trace, step)
    prediction = predict_sample(watched, c, maps, own if kwargs is None else kwargs, sample, level)
    return difference(prediction, trace.steps[step].output)


def compare_own_mix(
    watched: Watched, convention: Convention, maps: SizeMaps, latents: Tensor, noise: Tensor, prompt: str
) -> float:
    c = convention
    levels = watched.draw(prompt, c.size, steps=NUM_STEPS, **c.extra)
    signal, share = c.weights_of(c.level_of(levels, 1), abar_of(levels))
    mixed = signal * latents + share * noise
    answers = Answers(samples=lambda step, old: mixed.to(old) if step == 0 else None)
    trace = watched.draw(prompt, c.size, answers, steps=NUM_STEPS, **c.extra)
    wide = watched.draw(prompt, (c.size[0], 2 * c.size[1]), **c.extra).calls[c.call].kwargs
    kwargs = with_text(c, maps.kwargs, {path: leaves(wide)[path] for path in c.text})
    return compare(watched, c, maps, trace, 1, kwargs)


@torch.no_grad()
def gives_same_in_batch(watched: Watched, convention: Convention, maps: SizeMaps) -> bool:
    """Return True if the denoiser gives two samples at two levels in one call what it gives them alone."""
    c, generator = convention, torch.Generator().manual_seed(11)
    trace = watched.draw(c.prompts[0], c.size, steps=NUM_STEPS, **c.extra)
    samples = torch.randn(2, maps.into.num_source, generator=generator)
    rows = [
        replace_leaves(
            with_level(c, maps, maps.kwargs, torch.tensor([c.level_of(trace, step)])),
            {c.latents: maps.into(sample[None]).reshape(maps.into.shape)},
        )
        for step, sample in enumerate(samples)
    ]
    alone = [join_values(watched.call_model(c.denoiser, "", ((), row))) for row in rows]
    try:
        together = split_rows(watched.call_model(c.denoiser, "", ((), stack_rows(rows))), len(rows))
    except Exception:  # a denoiser for one sample at a time fails in its own way
        return False
    pairs = list(zip(together, alone, strict=True))
    return all(a.shape == b.shape and difference(a, b) <= TOLERANCE for a, b in pairs)


def compare_step(convention: Convention, trace: Trace, latents: Tensor, noise: Tensor) -> float:
    c, scheduler, abar_T = convention, copy_scheduler(trace.scheduler), abar_of(trace)
    (a, b), (a2, b2) = (c.weights_of(c.level_of(trace, step), abar_T) for step in (0, 1))
    target = c.target_of(latents, noise, c.level_of(trace, 0), abar_T)
    out = scheduler.step(target, trace.steps[0].timestep, a * latents + b * noise)
    return difference(next_sample(out), a2 * latents + b2 * noise)


def abar_of(trace: Trace) -> Tensor | None:
    return getattr(trace.scheduler, "alphas_cumprod", None)


def with_text(convention: Convention, kwargs: Any, text: Mapping[Path, Any]) -> Any:
    """Return the arguments of one drawing with the text of another."""
    return replace_leaves(kwargs, {path: text[path] for path in convention.text})


def with_level(convention: Convention, maps: SizeMaps, kwargs: Any, level_1: Tensor) -> Any:
    """Return the arguments with a noise level, shape (1)."""
    base = leaves(kwargs)

    def given(path: Path) -> Any:
        value_1, old = convention.level_value(path, level_1, maps.tables), base[path]
        return (
            value_1.to(old.dtype).reshape(()).expand(old.shape)
            if isinstance(old, Tensor)
            else type(old)(value_1.item())
        )

    return replace_leaves(kwargs, {path: given(path) for path in convention.time})


def predict_sample(
    watched: Watched, convention: Convention, maps: SizeMaps, kwargs: Any, sample: Tensor, level: float
) -> Tensor:
    """Return what the scheduler would get for its sample at a level."""
    c = convention
    latents = maps.into(sample.flatten()[None].float()).reshape(maps.into.shape)
    given = with_level(c, maps, kwargs, torch.tensor([level], dtype=torch.float32))
    kwargs = replace_leaves(given, {c.latents: latents})
    output = watched.call_model(c.denoiser, "", ((), map_leaves(kwargs, lambda _, leaf: leaf)))
    return maps.out(join_values(output)[None]).reshape(maps.out.shape)
