"""Measures how a text-to-image pipeline of diffusers wants to be trained. No line here is about any one model.

The rules:
- the denoiser is the model that is called between two steps of the scheduler;
- of its arguments the one that follows the sample is the noisy latents, those that follow the step the noise level,
  those that follow the prompt the text, those that follow the size the geometry; the rest is constant;
- the objective is the (mix, target) with which one step of the pipeline's own scheduler, given the true target, lands
  exactly on the same image and noise, mixed at the next level.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from library.architectures.any_pipeline.convention import (
    Convention,
    Line,
    Mix,
    Target,
    Unconditional,
    list_paths,
    targets_of,
)
from library.architectures.any_pipeline.maps import (
    SizeMaps,
    answer_zeros,
    read_level_values,
    read_maps,
    read_pattern,
)
from library.architectures.any_pipeline.trees import Path, count_values, differing, empty_like, is_same, leaves
from library.architectures.any_pipeline.watch import (
    Answers,
    Call,
    Refused,
    Size,
    Trace,
    Watched,
    WrongSize,
    copy_scheduler,
    next_sample,
)

PROMPTS = ("a cat", "two dogs on a hill")
MOST_ERROR = 1e-3  # of a scheduler's step, to accept an objective
SCALES = ("guidance_scale", "cfg_scale", "pag_scale")  # ends of the names of options that guide
NUM_LEVELS = 7  # steps of a drawing from which lines of levels are fitted


def measure(
    watched: Watched, size: Size, prompts: tuple[str, str] = PROMPTS, **options: Any
) -> tuple[Convention, SizeMaps]:
    """Measure the convention of a pipeline whose models are in memory, at `size`. `options` go to the pipeline.

    Raises Refused with the reason if the rules cannot express it.
    """
    if not watched.vae:
        raise Refused("it draws without a VAE, which this script does not train")
    watched.denoiser = None
    watched.memory.clear()
    convention, trace = read_roles(watched, size, prompts, options)
    template = trace.calls[convention.call].output
    assert trace.pixels is not None
    convention = replace(convention, pixel_shape=tuple(trace.pixels.shape))
    if tuple(trace.pixels.shape[-2:]) != size:
        raise WrongSize(f"an image of {size} comes out with {tuple(trace.pixels.shape[-2:])}")
    convention = read_objective(watched, convention, trace, template)
    convention = read_time(watched, convention, template)
    convention, maps = read_output(watched, convention, template)
    if convention.calls_per_step > 1 and abs(abs(maps.out.common_scale or 0.0) - 1) > 1e-4:
        raise Refused("guidance cannot be switched off")
    if maps.residue > 1e-5:
        raise Refused(f"what the scheduler gets also depends on the sample (by {maps.residue:.2g})")
    require_unit_noise(watched, convention, template)
    scale_Cpp, offset_Cpp = read_pattern(maps.decode)
    return replace(
        convention, output=empty_like(template),
        latent_shape=maps.decode.shape, scale_Cpp=scale_Cpp, offset_Cpp=offset_Cpp,
        unconditional=find_unconditional(watched, convention, options),
    ), maps  # fmt: skip


# --- which argument is what ---


def read_roles(
    watched: Watched, size: Size, prompts: tuple[str, str], options: Mapping[str, Any]
) -> tuple[Convention, Trace]:
    """Find the denoiser and the role of each of its arguments by changing seed, prompt, size and step one at a time."""
    extra, trace = find_quiet(watched, prompts[0], size, options)
    name = find_denoiser(watched, trace, prompts, size, extra)
    watched.denoiser = name

    def calls(prompt: str, sides: Size, answers: Answers | None = None, **more: Any) -> list[Call]:
        return watched.draw(prompt, sides, answers, **{**extra, **more}).calls

    trace = watched.draw(prompts[0], size, **extra)
    first, per_step = trace.calls, len(trace.calls) // len(trace.steps)
    if per_step * len(trace.steps) != len(first):
        raise Refused(f"{name} is called in some steps only, so two models share the noise levels")
    call = find_conditional(first[:per_step], calls, prompts, size, watched)
    wide = (size[0], 2 * size[1])
    base = leaves(first[call].kwargs)
    by_text = differing(base, leaves(calls(prompts[1], size)[call].kwargs))
    by_size = differing(base, leaves(calls(prompts[0], wide)[call].kwargs))
    by_step = differing(base, leaves(first[call + per_step].kwargs))
    by_sample = differing(
        *(leaves(calls(prompts[0], size, constant_sample(v))[call + per_step].kwargs) for v in (0.0, 1.0))
    )
    latents = find_latents(by_sample, by_text, base)
    time = tuple(sorted((p for p in by_step - by_sample if isinstance(base.get(p), Tensor | float | int)), key=str))
    if not time:
        raise Refused("no argument of the denoiser follows the step")
    text, geometry = by_text - {latents}, by_size - {latents}
    if absent := [path for path in text if path not in base]:
        raise Refused(f"the number of the denoiser's arguments follows the prompt ({list_paths(tuple(absent))})")
    both = sorted(text & geometry, key=str)
    composed = {
        **leaves(calls(prompts[0], wide)[call].kwargs),
        **{p: leaves(calls(prompts[1], size)[call].kwargs)[p] for p in text},
    }
    actual = leaves(calls(prompts[1], wide)[call].kwargs)
    both += [p for p in differing(composed, actual) if p != latents and p not in time and p not in both]
    if both:
        raise Refused(f"{list_paths(tuple(both))} follows caption and size together, so captions cannot be cached")
    constant = base.keys() - text - geometry - set(time) - {latents}
    return Convention(
        type(watched.pipe).__name__, name, call, per_step, latents, time, sort(text), sort(geometry), sort(constant),
        extra, size, prompts, (),
    ), trace  # fmt: skip


def sort(paths: set[Path]) -> tuple[Path, ...]:
    return tuple(sorted(paths, key=str))


def constant_sample(value: float) -> Answers:
    return Answers(samples=lambda step, sample: torch.full_like(sample, value) if step == 0 else None)


def find_quiet(watched: Watched, prompt: str, size: Size, options: Mapping[str, Any]) -> tuple[dict[str, Any], Trace]:
    """Return the options with which the denoiser computes the least, and a drawing with them."""
    best: tuple[float, dict[str, Any], Trace] | None = None
    failure: Exception | None = None
    for quiet in list_quiet(watched):
        try:
            trace = watched.draw(prompt, size, **{**quiet, **options})
        except Refused:
            raise
        except Exception as error:  # a scale that this pipeline does not take
            failure = failure or error
            continue
        if not trace.steps:
            raise Refused("the pipeline draws without calling its scheduler")
        between = {call.name for call in trace.calls if 0 < call.step < len(trace.steps)}
        amount = sum(count_values(c.output) for c in trace.calls if c.name in between)
        if best is None or amount < best[0]:
            best = amount, {**quiet, **options}, trace
        if amount <= 1.001 * sum(step.output.numel() for step in trace.steps):
            break  # one output for each step
    if best is None:
        raise WrongSize(f"it cannot draw an image of {size[0]}x{size[1]}: {failure}") from failure
    return best[1], best[2]


def list_quiet(watched: Watched) -> Iterator[dict[str, Any]]:
    """Yield the ways to switch guidance off that pipelines have."""
    names = [name for name in watched.options if name.endswith(SCALES) and not name.startswith("image")]
    schedules = {name: None for name in watched.options if "guidance_schedule" in name}
    for value in (1.0, 0.0):
        yield {**dict.fromkeys(names, value), **schedules}
    yield from ({name: value} for name in names for value in (1.0, 0.0) if len(names) > 1)
    yield {}


def find_denoiser(
    watched: Watched, trace: Trace, prompts: tuple[str, str], size: Size, extra: Mapping[str, Any]
) -> str:
    """Return the component that is called between two steps, follows the prompt and reaches the scheduler."""
    names = sorted({call.name for call in trace.calls if 0 < call.step < len(trace.steps)})
    if not names:
        raise Refused("no model is called between two steps of the scheduler")
    following = []
    for name in names:
        watched.denoiser = name
        pairs = zip(*(watched.draw(prompt, size, **extra).calls for prompt in prompts), strict=False)
        if any(differing(leaves(a.kwargs), leaves(b.kwargs)) for a, b in pairs):
            following.append(name)
    if len(following) > 1:
        raise Refused(f"several models draw ({', '.join(following)})")
    if not following:
        raise Refused("no argument of the denoiser follows the prompt")
    return following[0]


def find_conditional(first: list[Call], calls: Any, prompts: tuple[str, str], size: Size, watched: Watched) -> int:
    """Return which call of a step has the prompt and not the negative one."""
    other = calls(prompts[1], size)
    which = [i for i, call in enumerate(first) if differing(leaves(call.kwargs), leaves(other[i].kwargs))]
    if not which:
        raise Refused("no argument of the denoiser follows the prompt")
    if len(which) > 1:
        if "negative_prompt" not in watched.options:
            raise Refused(f"{len(which)} calls in each step follow the prompt")
        blue, red = (calls(prompts[0], size, negative_prompt=text) for text in ("blue", "a red house"))
        which = [i for i in which if not differing(leaves(blue[i].kwargs), leaves(red[i].kwargs))]
        if len(which) != 1:
            raise Refused(f"{len(which)} calls in each step follow the prompt")
    return which[0]


def find_latents(by_sample: set[Path], by_text: set[Path], base: Mapping[Path, Any]) -> Path:
    found = [path for path in by_sample if isinstance(base.get(path), Tensor)]
    if len(found) != 1:
        raise Refused(f"the sample reaches {len(found)} arguments of the denoiser ({list_paths(sort(set(found)))})")
    if found[0] in by_text:
        raise Refused("caption and latents share an argument of the denoiser")
    return found[0]


# --- objective ---


def read_objective(watched: Watched, convention: Convention, trace: Trace, template: Any) -> Convention:
    """Find the objective. A scheduler that is random or rescales its sample gives way to DDIM of its configuration."""
    try:
        mix, target = find_objective(trace)
        found = replace(convention, mix=mix, target=target)
        if mix == "ddpm" and not sees_plain_sample(watched, found, template):
            raise Refused("the scheduler rescales its sample")
        return found
    except Refused:
        if getattr(watched.pipe.scheduler, "alphas_cumprod", None) is None:
            raise
    watched.set_scheduler(plain_scheduler(watched.pipe.scheduler))
    trace = watched.draw(convention.prompts[0], convention.size, **convention.extra)
    mix, target = find_objective(trace)
    return replace(convention, mix=mix, target=target, replaces_scheduler=True)


def plain_scheduler(scheduler: Any) -> Any:
    """Return DDIM with the noise levels and the prediction of another scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0,
        rescale_betas_zero_snr=scheduler.config.get("rescale_betas_zero_snr", False),
    )  # fmt: skip


def sees_plain_sample(watched: Watched, convention: Convention, template: Any) -> bool:
    """Return True if the denoiser gets the scheduler's sample unscaled."""
    zeros = answer_zeros(convention, template, convention.size)
    outputs = [replace(zeros, samples=constant_sample(value).samples) for value in (0.0, 1.0)]
    place = convention.call + convention.calls_per_step
    zero, one = (
        leaves(watched.draw(convention.prompts[0], convention.size, answers, **convention.extra).calls[place].kwargs)[
            convention.latents
        ]
        for answers in outputs
    )
    return bool(((one - zero - 1).abs() < 1e-5).all())


def find_objective(trace: Trace) -> tuple[Mix, Target]:
    """Return the (mix, target) with which one step of the trace's scheduler is exact."""
    scheduler, shape, timestep = trace.scheduler, trace.steps[0].sample.shape, trace.steps[0].timestep
    generator = torch.Generator().manual_seed(5)
    latent, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    for mix, (now, then) in list_mixes(scheduler, timestep).items():
        for target, value in targets_of(latent, noise, *now).items():
            if mix == "flow" and target == "velocity":
                continue
            try:
                out = copy_scheduler(scheduler).step(value, timestep, now[0] * latent + now[1] * noise)
            except Exception:  # not a prediction that this scheduler takes
                continue
            if (next_sample(out) - (then[0] * latent + then[1] * noise)).abs().max() < MOST_ERROR:
                return mix, target
    raise Refused(f"no known objective makes a step of {type(scheduler).__name__} exact")


def list_mixes(scheduler: Any, timestep: Any) -> dict[Mix, tuple[tuple[float, float], tuple[float, float]]]:
    """Return the weights of image and noise at the first and at the second step, for each kind of mix."""
    timesteps = [float(value) for value in scheduler.timesteps]
    now = float(torch.as_tensor(timestep).flatten()[0])
    place = timesteps.index(now) if now in timesteps[:-1] else 0
    mixes: dict[Mix, tuple[tuple[float, float], tuple[float, float]]] = {}
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) > place + 1:
        a, b = float(sigmas[place]), float(sigmas[place + 1])
        if max(a, b) <= 1 + 1e-6:
            mixes["flow"] = (1 - a, a), (1 - b, b)
    abar_T = getattr(scheduler, "alphas_cumprod", None)
    if abar_T is not None and len(abar_T) == 1000:
        first, second = (float(abar_T[int(t)]) for t in (now, timesteps[place + 1]))
        mixes["ddpm"] = tuple((math.sqrt(abar), math.sqrt(1 - abar)) for abar in (first, second))  # type: ignore[assignment]
    return mixes


# --- noise levels ---


def read_time(watched: Watched, convention: Convention, template: Any) -> Convention:
    """Fit a line to each argument that follows the step; the others are read from tables for each size."""
    levels, given = read_level_values(watched, convention, convention.size, template, NUM_LEVELS)
    base = leaves(
        watched.draw(convention.prompts[0], convention.size, Answers(stops_at=0), **convention.extra).calls[0].kwargs
    )
    lines = {path: fit_line(levels, values, base.get(path)) for path, values in given.items()}
    return replace(convention, lines={path: line for path, line in lines.items() if line is not None})


def fit_line(levels: list[float], given: list[float], example: Any) -> Line | None:
    """Return the line through (level, given); None if there is none."""
    x, y = torch.tensor(levels, dtype=torch.float64), torch.tensor(given, dtype=torch.float64)
    factor, offset = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution.flatten().tolist()
    span = max(1e-9, float(y.max() - y.min()))
    error = float((y - (factor * x + offset)).abs().max()) / span
    if abs(factor - round(factor)) < 1e-5 * abs(factor):
        factor = float(round(factor))
    if abs(offset - round(offset)) < 1e-6 * span:
        offset = float(round(offset))
    takes_whole = isinstance(example, Tensor) and not example.is_floating_point()
    are_whole = all(abs(value - round(value)) < 1e-9 for value in given)
    if takes_whole and error <= 1e-6:
        return Line(factor, offset, True)
    if are_whole and error > 1e-6 and error * span <= 1:
        return Line(float(round(factor)), float(round(offset)), True)
    return Line(factor, offset, False) if error <= 1e-4 else None


# --- output ---


def read_output(watched: Watched, convention: Convention, template: Any) -> tuple[Convention, SizeMaps]:
    """Read the maps at the size of the convention, and what is true of the denoiser's output for every size."""
    c = convention
    maps = read_maps(watched, c, c.size, template)
    other = watched.draw(c.prompts[1], c.size, **c.extra).calls[c.call].output
    if (shift := count_values(other) - count_values(template)) != 0:
        second = read_maps(watched, c, c.size, other, c.prompts[1]).out
        if second.shape != maps.out.shape or not torch.allclose(second.scale_M, maps.out.scale_M):
            raise Refused("where the prediction lies in the denoiser's output follows the caption")
        if torch.equal(second.index_M - shift, maps.out.index_M):
            c = replace(c, counts_from_end=True)
        elif not torch.equal(second.index_M, maps.out.index_M):
            raise Refused("where the prediction lies in the denoiser's output follows the caption")
    return (c, maps) if c is convention else (c, read_maps(watched, c, c.size, template))


def require_unit_noise(watched: Watched, convention: Convention, template: Any) -> None:
    """Raise Refused if a flow's drawing does not begin with noise of unit variance."""
    if convention.mix != "flow":
        return
    answers = answer_zeros(convention, template, convention.size)
    trace = watched.draw(convention.prompts[0], convention.size, answers, **convention.extra)
    deviation = float(trace.steps[0].sample.float().std()) / max(convention.level_of(trace, 0), 1e-3)
    if abs(deviation - 1) > 0.15:
        raise Refused(f"it draws from noise of standard deviation {deviation:.2g}, not 1")


# --- the negative prompt ---


def find_unconditional(watched: Watched, convention: Convention, options: Mapping[str, Any]) -> Unconditional | None:
    """Find the row of a call that has the pipeline's negative prompt while guidance is on."""
    c = convention
    if "negative_prompt" not in watched.options:
        return None
    scales = [name for name in c.extra if name.endswith(("guidance_scale", "cfg_scale"))]
    for extra in (dict(options), *({**c.extra, name: 3.0} for name in scales)):
        try:
            blue, red = (
                watched.draw(c.prompts[0], c.size, negative_prompt=text, **extra).calls
                for text in ("blue", "a red house")
            )
        except Exception:  # an option that needs others
            continue
        for place, (a, b) in enumerate(zip(blue, red, strict=False)):
            if a.step:
                break
            rows = find_rows(c, leaves(a.kwargs), leaves(b.kwargs))
            if rows is not None:
                return Unconditional(extra, place, *rows)
    return None


def find_rows(convention: Convention, a: Mapping[Path, Any], b: Mapping[Path, Any]) -> tuple[int, int] | None:
    """Return (row, number of rows) of the values that differ between two calls; None if it is not exactly one row."""
    paths = [path for path in convention.text if path in a and path in b and not is_same(a[path], b[path])]
    if not paths or any(path not in a for path in convention.text):
        return None
    num_rows = a[convention.latents].shape[0] if isinstance(convention.latents[-1], str) else 1
    if num_rows == 1:
        return 0, 1
    # With one call for both prompts, a row of every text argument is the negative prompt's.
    if not all(isinstance(a[path], Tensor) and a[path].shape[:1] == (num_rows,) for path in convention.text):
        return None
    first, second = a[paths[0]], b[paths[0]]
    if first.shape != second.shape:
        return None
    rows = [row for row in range(num_rows) if not torch.equal(first[row], second[row])]
    return (rows[0], num_rows) if len(rows) == 1 else None
