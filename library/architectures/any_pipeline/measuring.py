"""Measures how a text-to-image pipeline of diffusers wants to be trained. No line here is about any one model.

The rules:
- the denoiser is the model that is called between two steps of the scheduler;
- of its arguments the one that follows the sample is the noisy latents, those that follow the step the noise level,
  those that follow the prompt the text, those that follow the size the geometry; the rest is constant;
- the objective is the (mix, target) with which one step of the pipeline's own scheduler, given the true target, lands
  exactly on the same image and noise, mixed at the next level.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from library.architectures.any_pipeline.conditioning import compose, digest_others
from library.architectures.any_pipeline.convention import (
    Convention,
    Line,
    Mix,
    Target,
    Unconditional,
    format_constant,
    targets_of,
)
from library.architectures.any_pipeline.maps import SizeMaps, answer_with, read_level_values, read_maps, read_pattern
from library.architectures.any_pipeline.trees import (
    Path,
    count_values,
    differing,
    empty_like,
    float_tensors,
    is_same,
    leaves,
    list_paths,
)
from library.architectures.any_pipeline.watch import (
    Answers,
    Call,
    Refused,
    Size,
    Trace,
    Watched,
    WrongSize,
    copy_scheduler,
)

PROMPTS = ("a cat", 'two dogs and a "sign"')  # some pipelines encode quoted words by another model
NEGATIVE = ("blue", "a red house")
MOST_ERROR = 1e-3  # of a scheduler's step, to accept an objective
SCALES = ("guidance_scale", "cfg_scale", "pag_scale")  # ends of the names of options that guide
NUM_LEVELS = 7  # steps of a drawing from which lines of levels are fitted
NUM_STAGES = 3  # of `measure`


def measure(
    watched: Watched, size: Size, prompts: tuple[str, str] = PROMPTS, **options: Any
) -> tuple[Convention, SizeMaps]:
    """Measure the convention of a pipeline whose models are in memory, at `size`. `options` go to the pipeline.

    Raises Refused with the reason if the rules cannot express the pipeline.
    """
    if not watched.vae:
        raise Refused("it draws without a VAE, which this script does not train")
    watched.denoiser = None
    watched.memory.clear()
    convention = read_roles(watched, size, prompts, options)
    watched.advance(1)
    convention, maps = read_numbers(watched, convention)
    watched.advance(1)
    if convention.calls_per_step > 1 and not torch.allclose(maps.out.scale_M.abs(), torch.ones(()), atol=1e-4):
        raise Refused("guidance cannot be switched off")
    if (residue := float(maps.out.offset_M.abs().max())) > 1e-5:
        raise Refused(f"what the scheduler gets also depends on the sample (by {residue:.2g})")
    scale_Cpp, offset_Cpp = read_pattern(maps.decode)
    convention = replace(convention, latent_shape=maps.decode.shape, scale_Cpp=scale_Cpp, offset_Cpp=offset_Cpp)
    convention = replace(convention, unconditional=find_unconditional(watched, convention, options))
    watched.advance(1)
    return convention, maps


# --- which argument is what ---


def read_roles(watched: Watched, size: Size, prompts: tuple[str, str], options: Mapping[str, Any]) -> Convention:
    """Find the denoiser and the role of each of its arguments by changing seed, prompt, size and step one at a time."""
    extra, trace = find_quiet(watched, prompts[0], size, options)
    watched.denoiser = name = find_denoiser(watched, trace, prompts, size, extra)
    wide, tall = (size[0], 2 * size[1]), (2 * size[0], size[1])

    def draw(prompt: str = prompts[0], sides: Size = size, answers: Answers | None = None, **more: Any) -> list[Call]:
        return watched.draw(prompt, sides, answers, **{**extra, **more}).calls

    trace = watched.draw(prompts[0], size, **extra)
    pixels = trace.pixels
    if pixels is None or tuple(pixels.shape[-2:]) != size:
        raise WrongSize(f"an image of {size} comes out with {None if pixels is None else tuple(pixels.shape[-2:])}")
    per_step = len(trace.calls) // len(trace.steps)
    if per_step * len(trace.steps) != len(trace.calls):
        raise Refused(f"{name} is called in some steps only, so two models share the noise levels")
    call = find_conditional(trace.calls[:per_step], draw, prompts, watched)

    def arguments(*drawn: Any, step: int = 0) -> dict[Path, Any]:
        return leaves(draw(*drawn)[call + step * per_step].kwargs)

    base, other, of_wide = leaves(trace.calls[call].kwargs), arguments(prompts[1]), arguments(prompts[0], wide)
    by_text, by_size = differing(base, other), differing(base, of_wide) | differing(base, arguments(prompts[0], tall))
    by_step = differing(base, leaves(trace.calls[call + per_step].kwargs))
    constants = [Answers(samples=partial(fill_first_sample, value)) for value in (0.0, 1.0)]
    by_sample = differing(*(arguments(prompts[0], size, answers, step=1) for answers in constants))
    latents = find_latents(by_sample, by_text, base)
    time = sort(p for p in by_step - by_sample if isinstance(base.get(p), Tensor | float | int))
    if not time:
        raise Refused("no argument of the denoiser follows the step")
    text = by_text - {latents}
    if absent := sort(path for path in text if path not in base):
        raise Refused(f"the number of the denoiser's arguments follows the prompt ({list_paths(absent)})")
    joint = {path: found for path in text & by_size if (found := find_growing_axis(base[path], of_wide.get(path)))}
    composed = compose(joint, of_wide, {path: other[path] for path in text}) if text & by_size <= joint.keys() else {}
    together = differing(composed, arguments(prompts[1], wide)) if composed else text & by_size - joint.keys()
    if paths := sort(together - {*time, latents}):
        raise Refused(f"{list_paths(paths)} follows caption and size together, so captions cannot be cached")
    constant = sort(base.keys() - by_text - by_size - {*time, latents})
    fixed = digest_others(base, {*text, *time, latents})
    return Convention(
        type(watched.pipe).__name__, name, call, per_step, latents, time, sort(text), sort(by_size - text - {latents}),
        joint, {path: format_constant(base[path]) for path in constant}, fixed, extra, size, prompts,
        tuple(pixels.shape), output=empty_like(trace.calls[call].output),
    )  # fmt: skip


def sort(paths: Any) -> tuple[Path, ...]:
    return tuple(sorted(paths, key=str))


def fill_first_sample(value: float, step: int, sample: Tensor) -> Tensor | None:
    return torch.full_like(sample, value) if step == 0 else None


def find_growing_axis(small: Any, large: Any) -> tuple[int, int] | None:
    """Return (axis, length) of an argument to whose end a larger size adds values; None if it follows the size
    otherwise."""
    if not (isinstance(small, Tensor) and isinstance(large, Tensor) and small.ndim == large.ndim):
        return None
    axes = [axis for axis in range(small.ndim) if small.shape[axis] < large.shape[axis]]
    if len(axes) != 1 or not is_same(large.narrow(axes[0], 0, small.shape[axes[0]]), small):
        return None
    return axes[0], small.shape[axes[0]]


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
        amount = sum(count_values(call.output) for call in trace.calls if call.name in between)
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
    """Return the component that is called between two steps and follows the prompt."""
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


def find_conditional(first: Sequence[Call], draw: Any, prompts: tuple[str, str], watched: Watched) -> int:
    """Return which call of a step has the prompt and not the negative one."""

    def following(a: Sequence[Call], b: Sequence[Call]) -> set[int]:
        return {i for i in range(len(first)) if differing(leaves(a[i].kwargs), leaves(b[i].kwargs))}

    which = following(first, draw(prompts[1]))
    if len(which) > 1 and "negative_prompt" in watched.options:
        which -= following(*(draw(negative_prompt=text) for text in NEGATIVE))
    if len(which) != 1:
        raise Refused(f"{len(which)} calls in each step follow the prompt" if which else "no call follows the prompt")
    return which.pop()


def find_latents(by_sample: set[Path], by_text: set[Path], base: Mapping[Path, Any]) -> Path:
    found = [path for path in by_sample if isinstance(base.get(path), Tensor)]
    if len(found) != 1:
        raise Refused(f"the sample reaches {len(found)} arguments of the denoiser ({list_paths(sort(found))})")
    if found[0] in by_text:
        raise Refused("caption and latents share an argument of the denoiser")
    return found[0]


# --- objective, noise levels and output ---


def read_numbers(watched: Watched, convention: Convention) -> tuple[Convention, SizeMaps]:
    """Read objective, levels and maps. A scheduler that is random or rescales its sample gives way to DDIM of its
    configuration."""
    try:
        return read_with_scheduler(watched, convention)
    except Refused:
        if getattr(watched.pipe.scheduler, "alphas_cumprod", None) is None:
            raise
    watched.set_scheduler(plain_scheduler(watched.pipe.scheduler))
    return read_with_scheduler(watched, replace(convention, replaces_scheduler=True))


def read_with_scheduler(watched: Watched, convention: Convention) -> tuple[Convention, SizeMaps]:
    c, zeros = convention, answer_with(convention, convention.output, convention.size)
    trace = watched.draw(c.prompts[0], c.size, zeros, **c.extra)
    mix, target = find_objective(trace)
    c = replace(c, mix=mix, target=target)
    if mix == "flow":
        deviation = float(trace.steps[0].sample.float().std()) / max(c.level_of(trace, 0), 1e-3)
        if abs(deviation - 1) > 0.15:
            raise Refused(f"it draws from noise of standard deviation {deviation:.2g}, not 1")
    levels, given = read_level_values(watched, c, c.size, c.output, NUM_LEVELS)
    lines = {path: fit_line(levels, values, leaves(trace.calls[c.call].kwargs)[path]) for path, values in given.items()}
    c = replace(c, lines={path: line for path, line in lines.items() if line is not None})
    maps = read_maps(watched, c, c.size, c.output)
    if mix == "ddpm" and not torch.allclose(maps.into.scale_M, torch.ones(()), atol=1e-5):
        raise Refused("the scheduler rescales its sample")
    return find_counting(watched, c, maps)


def plain_scheduler(scheduler: Any) -> Any:
    """Return DDIM with the noise levels and the prediction of another scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0,
        rescale_betas_zero_snr=scheduler.config.get("rescale_betas_zero_snr", False),
    )  # fmt: skip


def find_objective(trace: Trace) -> tuple[Mix, Target]:
    """Return the (mix, target) with which one step of the trace's scheduler is exact."""
    scheduler, timestep = trace.scheduler, trace.steps[0].timestep
    latent, noise = torch.randn(2, *trace.steps[0].sample.shape, generator=torch.Generator().manual_seed(5))
    for mix, (now, then) in list_mixes(scheduler, timestep).items():
        for target, value in targets_of(latent, noise, *now).items():
            if mix == "flow" and target == "velocity":
                continue
            try:
                out = copy_scheduler(scheduler).step(value, timestep, now[0] * latent + now[1] * noise)
            except Exception:  # not a prediction that this scheduler takes
                continue
            if (float_tensors(out)[0] - (then[0] * latent + then[1] * noise)).abs().max() < MOST_ERROR:
                return mix, target
    raise Refused(f"no known objective makes a step of {type(scheduler).__name__} exact")


def list_mixes(scheduler: Any, timestep: Any) -> dict[Mix, list[tuple[float, float]]]:
    """Return the weights of image and noise at the first and at the second step, for each kind of mix."""
    timesteps = [float(value) for value in scheduler.timesteps]
    now = float(torch.as_tensor(timestep).flatten()[0])
    place = timesteps.index(now) if now in timesteps[:-1] else 0
    mixes: dict[Mix, list[tuple[float, float]]] = {}
    sigmas, abar_T = (getattr(scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
    if sigmas is not None and len(sigmas) > place + 1 and sigmas[place : place + 2].max() <= 1 + 1e-6:
        mixes["flow"] = [(1 - float(sigma), float(sigma)) for sigma in sigmas[place : place + 2]]
    if abar_T is not None and len(abar_T) == 1000:
        abars = [float(abar_T[int(t)]) for t in (now, timesteps[place + 1])]
        mixes["ddpm"] = [(math.sqrt(abar), math.sqrt(1 - abar)) for abar in abars]
    return mixes


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
    if isinstance(example, Tensor) and not example.is_floating_point() and error <= 1e-6:
        return Line(factor, offset, True)
    if all(abs(value - round(value)) < 1e-9 for value in given) and error > 1e-6 and error * span <= 1:
        return Line(float(round(factor)), float(round(offset)), True)
    return Line(factor, offset, False) if error <= 1e-4 else None


def find_counting(watched: Watched, convention: Convention, maps: SizeMaps) -> tuple[Convention, SizeMaps]:
    """Find whether the prediction is counted from the end of the output, behind tokens of the caption."""
    c = convention
    other = watched.draw(c.prompts[1], c.size, Answers(stops_at=c.calls_per_step), **c.extra).calls[c.call].output
    shift = count_values(other) - count_values(c.output)
    if shift:
        second = read_maps(watched, c, c.size, other, c.prompts[1]).out
        is_alike = second.shape == maps.out.shape and torch.allclose(second.scale_M, maps.out.scale_M)
        if is_alike and torch.equal(second.index_M - shift, maps.out.index_M):
            return replace(c, counts_from_end=True), replace(maps, out=replace(maps.out, from_end=True))
        if not (is_alike and torch.equal(second.index_M, maps.out.index_M)):
            raise Refused("where the prediction lies in the denoiser's output follows the caption")
    return c, maps


# --- the negative prompt ---


def find_unconditional(watched: Watched, convention: Convention, options: Mapping[str, Any]) -> Unconditional | None:
    """Find the row of a call that has the pipeline's negative prompt while guidance is on."""
    c = convention
    if "negative_prompt" not in watched.options:
        return None
    scales = [name for name in c.extra if name.endswith(("guidance_scale", "cfg_scale"))]
    for extra in (dict(options), *({**c.extra, name: 3.0} for name in scales)):
        try:
            blue, red = (watched.draw(c.prompts[0], c.size, negative_prompt=t, **extra).calls for t in NEGATIVE)
        except Exception:  # an option that needs others
            continue
        for place, (a, b) in enumerate(zip(blue, red, strict=False)):
            rows = find_rows(c, leaves(a.kwargs), leaves(b.kwargs)) if a.step == 0 else None
            if rows is not None:
                return Unconditional(extra, place, *rows)
    return None


def find_rows(convention: Convention, a: Mapping[Path, Any], b: Mapping[Path, Any]) -> tuple[int, int] | None:
    """Return (row, number of rows) of the values that differ between two calls; None if it is not exactly one row."""
    if not a.keys() & b.keys() >= set(convention.text):
        return None
    num_rows = a[convention.latents].shape[0] if isinstance(convention.latents[-1], str) else 1
    changed = [path for path in convention.text if not is_same(a[path], b[path])]
    if num_rows == 1 or not changed:
        return (0, 1) if changed else None
    # With one call for both prompts, a row of every text argument is the negative prompt's.
    first, second = a[changed[0]], b[changed[0]]
    has_rows = all(isinstance(a[path], Tensor) and a[path].shape[:1] == (num_rows,) for path in convention.text)
    if not has_rows or first.shape != second.shape:
        return None
    rows = [row for row in range(num_rows) if not torch.equal(first[row], second[row])]
    return (rows[0], num_rows) if len(rows) == 1 else None
