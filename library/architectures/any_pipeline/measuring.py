"""Measures how a text-to-image pipeline of diffusers wants to be trained. No line here is about any one model.

The rules:
- the denoiser is the model that is called between two steps of the scheduler;
- of its arguments the one that follows the sample is the noisy latents, those that follow the step the noise level,
  those that follow the prompt the text, those that follow the size the geometry; the rest is constant;
- the objective is the (mix, target) with which one step of the pipeline's own scheduler, given the true target, lands
  exactly on the same image and noise, mixed at the next level.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from library.architectures.any_pipeline.check import TOLERANCE, compare_step
from library.architectures.any_pipeline.conditioning import digest_others
from library.architectures.any_pipeline.convention import (
    PROMPTS,
    Convention,
    Joint,
    Line,
    Mix,
    Target,
    Unconditional,
    format_constant,
    level_error,
)
from library.architectures.any_pipeline.maps import (
    NUM_TABLE_STEPS,
    SizeMaps,
    answer_with,
    read_level_values,
    read_maps,
    read_pattern,
)
from library.architectures.any_pipeline.refusals import NO_VAE
from library.architectures.any_pipeline.trees import Path, differing, is_same, join_values, leaves, list_paths
from library.architectures.any_pipeline.watch import (
    Answers,
    CannotDraw,
    Refused,
    Size,
    Trace,
    Watched,
    WrongSize,
    copy_scheduler,
    replace_sample,
    setting,
)

NEGATIVE = ("blue", "a red house")
SCALES = ("guidance_scale", "cfg_scale", "pag_scale", "sag_scale")  # ends of the names of options that guide
NUM_TRIED_STEPS = (2, 3, 7)  # of drawings whose first steps show the objective
MOST_CALLS = 3  # of the denoiser in a step with guidance
DETERMINISTIC = {"algorithm_type": "dpmsolver++", "stochastic_sampling": False}  # settings of schedulers of flows
NUM_LEVELS = 7  # steps of a drawing from which lines of levels are fitted


def measure(watched: Watched, size: Size) -> tuple[Convention, SizeMaps]:
    """Measure the convention of a pipeline whose models are in memory, at `size`.

    Raises Refused with the reason if the rules cannot express the pipeline.
    """
    if not watched.vae:
        raise Refused(f"it {NO_VAE}")
    watched.denoiser, watched.idle = None, ()
    watched.memory.clear()
    watched.set_scheduler(watched.own_scheduler)
    convention = read_roles_plainly(watched, size)
    try:
        convention, maps = read_numbers(watched, convention)
    except Refused:
        # A scheduler that is random or rescales its sample gives way to a plain one of its configuration.
        if (plain := plain_scheduler(watched.pipe.scheduler)) is None:
            raise
        watched.set_scheduler(plain)
        convention, maps = read_numbers(watched, replace(convention, replaces_scheduler=True))
    if convention.mix == "ddpm":
        require_own_timesteps(watched.own_scheduler)
    scale_Cpp, offset_Cpp = read_pattern(maps.decode)
    convention = replace(convention, latent_shape=maps.decode.shape, scale_Cpp=scale_Cpp, offset_Cpp=offset_Cpp)
    return replace(convention, unconditional=find_unconditional(watched, convention)), maps


# --- which argument is what ---


def read_roles(watched: Watched, size: Size) -> Convention:
    """Find the denoiser and the roles of its arguments by changing sample, prompt, size and step one at a time."""
    extra, trace = find_quiet(watched, size)
    names = sorted({call.name for call in trace.calls if call.step == 1})
    watched.denoiser, watched.idle = find_denoiser(watched, names, size, extra)

    def arguments(prompt: str = PROMPTS[0], sides: Size = size, value: float | None = None) -> dict[Path, Any]:
        """Return those of the first step, or with `value` those of the second step for a sample of that value."""
        answers = None if value is None else Answers(samples=partial(replace_sample, torch.tensor(value)))
        return leaves(watched.draw(prompt, sides, answers, **extra).calls[0 if value is None else 1].kwargs)

    trace = watched.draw(PROMPTS[0], size, **extra)
    if trace.pixel_shape[-2:] != size:
        raise WrongSize(f"an image of {size} comes out with {trace.pixel_shape[-2:]}")
    if len(trace.calls) != len(trace.steps):
        raise Refused(
            f"{watched.denoiser} is called {len(trace.calls)} times in {len(trace.steps)} steps, so two models share "
            "the noise levels or guidance cannot be switched off"
        )
    wide, tall = (size[0], 2 * size[1]), (2 * size[0], size[1])
    base, second = (leaves(call.kwargs) for call in trace.calls[:2])
    of_wide, of_tall, other = arguments(sides=wide), arguments(sides=tall), arguments(PROMPTS[1])
    by_text, by_size = differing(base, other), differing(base, of_wide) | differing(base, of_tall)
    by_sample = differing(arguments(value=0.0), arguments(value=1.0))
    found = sort(path for path in by_sample if isinstance(base.get(path), Tensor))
    if len(found) != 1:
        raise Refused(f"the sample reaches {len(found)} arguments of the denoiser ({list_paths(found)})")
    latents, text = found[0], by_text - by_sample
    time = sort(p for p in differing(base, second) - by_sample if isinstance(base.get(p), Tensor | float | int))
    for role, paths in {"step": time, "prompt": text}.items():
        if not paths:
            raise Refused(f"no argument of the denoiser follows the {role}")
    geometry = sort(by_size - text - {latents})
    constant = sort(base.keys() - text - {*geometry, *time, latents})
    return Convention(
        pipeline=type(watched.pipe).__name__,
        denoiser=watched.denoiser,
        idle=tuple(watched.idle),
        latents=latents,
        time=time,
        text=sort(text),
        geometry=geometry,
        joint=find_joint(text & by_size, base, (of_wide, of_tall), other),
        constant={path: format_constant(base[path]) for path in constant},
        fixed=digest_others(base, {*text, *time, latents}),
        extra=extra,
        size=size,
        output=trace.calls[0].output,
        has_alpha=trace.pixel_shape[1] == 4,
        decoding=trace.decoding,
        argument_shape=tuple(base[latents].shape),
    )


def read_roles_plainly(watched: Watched, size: Size) -> Convention:
    """Find the roles, with a plain scheduler where the pipeline's own does not draw in few steps."""
    try:
        return read_roles(watched, size)
    except CannotDraw as error:
        if not error.in_scheduler or (plain := plain_scheduler(watched.pipe.scheduler)) is None:
            raise
        watched.set_scheduler(plain)
        try:
            return replace(read_roles(watched, size), replaces_scheduler=True)
        except CannotDraw:
            raise error from None


def find_denoiser(
    watched: Watched, names: Sequence[str], size: Size, extra: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """Return the model that follows the prompt of those called between two steps, and the others, whose outputs must
    not reach the scheduler."""
    if not names:
        raise Refused("no model is called between two steps of the scheduler")
    if len(names) == 1:
        return names[0], ()
    for name in names:
        watched.denoiser, watched.idle = name, tuple(other for other in names if other != name)
        drawn = [watched.draw(prompt, size, Answers(stops_at=0), **extra).calls for prompt in PROMPTS]
        if any(differing(leaves(a.kwargs), leaves(b.kwargs)) for a, b in zip(*drawn, strict=False)):
            break
    else:
        raise Refused(f"{len(names)} models are called between two steps and none follows the prompt")
    output = watched.draw(PROMPTS[0], size, **extra).calls[0].output
    given = []
    for value in (0.0, 1.0):
        with setting(watched, idle_value=value):
            given.append(watched.draw(PROMPTS[0], size, answer_with(output), **extra).steps[0].output)
    if not torch.equal(*given):
        raise Refused(f"{' and '.join(names)} draw together with guidance off, of which this script trains one")
    return watched.denoiser, watched.idle


def sort(paths: Any) -> tuple[Path, ...]:
    return tuple(sorted(paths, key=str))


def find_joint(
    paths: Set[Path], base: Mapping[Path, Any], sizes: Sequence[Mapping[Path, Any]], other: Mapping[Path, Any]
) -> dict[Path, Joint]:
    """Return the parts of each text argument that follows the size too. `sizes` are two arguments of twice the area,
    `other` those of another caption. Raises Refused if caption and size do not follow one another."""
    found = {p: find_parts(base.get(p), [size.get(p) for size in sizes], other.get(p)) for p in paths}
    if together := sort(path for path, joint in found.items() if joint is None):
        raise Refused(f"{list_paths(together)} follows caption and size together, so captions cannot be cached")
    return {path: joint for path, joint in found.items() if joint is not None}


def find_parts(base: Any, sizes: Sequence[Any], other: Any) -> Joint | None:
    """Return the parts of an argument that ends with a value for each part of the image, so that the end doubles with
    the area, behind text of any length; None for another one."""
    tensors = [value for value in (base, *sizes, other) if isinstance(value, Tensor)]
    if len(tensors) != len(sizes) + 2 or len({tensor.ndim for tensor in tensors}) != 1:
        return None
    axes = [axis for axis in range(base.ndim) if base.shape[axis] < sizes[0].shape[axis]]
    if len(axes) != 1:
        return None
    (axis,), num_image = axes, sizes[0].shape[axes[0]] - base.shape[axes[0]]
    num_text, others = (tensor.shape[axis] - num_image for tensor in (base, other))
    if num_text < 0 or others < 0:
        return None
    text, image = base.narrow(axis, 0, num_text), base.narrow(axis, num_text, num_image)
    is_apart = is_same(other.narrow(axis, others, num_image), image)
    is_apart = is_apart and all(is_same(size.narrow(axis, 0, num_text), text) for size in sizes)
    return (axis, num_text, num_image) if is_apart else None


def find_quiet(watched: Watched, size: Size) -> tuple[dict[str, Any], Trace]:
    """Return the options with which the models compute the least, and a drawing with them."""
    names = [name for name in watched.options if name.endswith(SCALES) and not name.startswith("image")]
    schedules = {name: None for name in watched.options if name.endswith("guidance_schedule")}
    drawn: list[tuple[dict[str, Any], Trace]] = []
    failure: CannotDraw | None = None
    for value in (1.0, 0.0):
        extra: dict[str, Any] = {**dict.fromkeys(names, value), **schedules}
        try:
            drawn.append((extra, watched.draw(PROMPTS[0], size, **extra)))
        except CannotDraw as error:  # a scale that this pipeline does not take
            failure = failure or error
    if failure is not None and not drawn:
        raise failure
    return min(drawn, key=lambda pair: sum(len(join_values(call.output)) for call in pair[1].calls if call.step == 1))


# --- objective, noise levels and output ---


def read_numbers(watched: Watched, convention: Convention) -> tuple[Convention, SizeMaps]:
    """Read objective, levels and maps."""
    c = convention
    traces = [watched.draw(PROMPTS[0], c.size, answer_with(c.output), steps=n, **c.extra) for n in NUM_TRIED_STEPS]
    c, trace = find_objective(c, traces), traces[0]
    if c.mix == "flow":
        deviation = float(trace.steps[0].sample.float().std()) / max(c.level_of(trace, 0), 1e-3)
        if abs(deviation - 1) > 0.15:
            raise Refused(f"it draws from noise of standard deviation {deviation:.2g}, not 1")
    levels, given = read_level_values(watched, c, c.size, c.output, NUM_LEVELS)
    lines = {path: fit_line(levels, values) for path, values in given.items()}
    if None in lines.values():
        levels, given = read_level_values(watched, c, c.size, c.output, NUM_TABLE_STEPS)
        lines = {path: line or fit_whole_line(levels, given[path]) for path, line in lines.items()}
    c = replace(c, lines={path: line for path, line in lines.items() if line is not None})
    maps = read_maps(watched, c, c.size)
    if c.mix == "ddpm" and not torch.allclose(maps.into.scale_M, torch.ones(()), atol=1e-5):
        raise Refused("the scheduler rescales its sample")
    return c, maps


def plain_scheduler(scheduler: Any) -> Any:
    """Return a scheduler that is not random and does not rescale its sample: for a flow one of the same class, else
    DDIM, with the noise levels and the prediction of the other. None if there is none."""
    from diffusers import DDIMScheduler

    config = scheduler.config
    if config.get("prediction_type") == "flow_prediction" or getattr(scheduler, "alphas_cumprod", None) is None:
        changed = {name: value for name, value in DETERMINISTIC.items() if config.get(name, value) != value}
        return type(scheduler).from_config(config, **changed) if changed else None
    # DDIM does not know every schedule and setting that makes noise levels, such as CogVideoX's shift.
    plain = DDIMScheduler.from_config(
        config, clip_sample=False, thresholding=False, set_alpha_to_one=True, timestep_spacing="leading",
        steps_offset=0, beta_schedule="linear", trained_betas=None, rescale_betas_zero_snr=False,
    )  # fmt: skip
    plain.alphas_cumprod = scheduler.alphas_cumprod.clone()
    return plain


def require_own_timesteps(scheduler: Any) -> None:
    """Raise Refused if a scheduler of DDPM's noise levels calls them by other numbers than their places in the list,
    as EulerDiscreteScheduler does with continuous timesteps."""
    own = copy_scheduler(scheduler)
    own.set_timesteps(NUM_LEVELS)
    if getattr(own, "sigmas", None) is None:  # it takes its levels from the list by their places
        return
    abar_T = own.alphas_cumprod.double().cpu().clamp(min=1e-9)
    place = int(torch.searchsorted(((1 - abar_T) / abar_T).sqrt(), own.sigmas.double().cpu().max()))
    timestep = float(own.timesteps.max())
    if abs(min(place, len(abar_T) - 1) - timestep) > 2:  # both are rounded
        raise Refused(
            f"its {type(scheduler).__name__} tells the denoiser {timestep:.4g} at a noise level that is number {place} "
            f"of its {len(abar_T)}, and other numbers than these are not trained; use a scheduler_config.json with "
            "discrete timesteps, if the model was trained with them"
        )


def find_objective(convention: Convention, traces: Sequence[Trace]) -> Convention:
    """Return a convention with the mix and the target with which the first step of the scheduler is exact in each
    drawing: one whose timesteps are rounded is exact by chance in some."""
    for mix in get_args(Mix):
        for target in get_args(Target):
            c = replace(convention, mix=mix, target=target)
            try:
                if mix == "flow" and c.level_of(traces[0], 0) > 1 + 1e-6:
                    continue
                error = max(compare_step(c, trace) for trace in traces)
            except Exception:  # the scheduler has no such levels, or does not take such a prediction
                continue
            if error < TOLERANCE:
                return c
    raise Refused(
        f"no known objective makes a step of its {type(traces[0].scheduler).__name__} exact; use the "
        "scheduler_config.json of its publisher"
    )


def fit_line(levels: list[float], given: list[float]) -> Line | None:
    """Return the line through (level, given); None if there is none."""
    factor, offset, span = regress(levels, given)
    # The levels are rounded to float32.
    if abs(factor - round(factor)) < 1e-5 * abs(factor):
        factor = float(round(factor))
    if abs(offset - round(offset)) < 1e-6 * span:
        offset = float(round(offset))
    line = Line(factor, offset)
    return line if (line.at(torch.tensor(levels)) - torch.tensor(given)).abs().max() <= 1e-4 * span else None


def fit_whole_line(levels: list[float], given: list[float]) -> Line | None:
    """Return the line of whole coefficients whose values are cut or rounded to those given; None if there is none."""
    factor, offset, _ = regress(levels, given)
    if any(value != round(value) for value in given):
        return None
    # Cut values lie half a unit below their line in the mean.
    lines = (Line(round(factor), round(offset + 0.5), "cut"), Line(round(factor), round(offset), "rounded"))
    return next((line for line in lines if level_error(line, levels, given) == 0), None)


def regress(levels: list[float], given: list[float]) -> tuple[float, float, float]:
    """Return factor, offset and the span of the values of the line nearest to (level, given)."""
    x, y = torch.tensor(levels, dtype=torch.float64), torch.tensor(given, dtype=torch.float64)
    factor, offset = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution.flatten().tolist()
    return factor, offset, max(1e-9, float(y.max() - y.min()))


# --- the negative prompt ---


def find_unconditional(watched: Watched, convention: Convention) -> Unconditional | None:
    """Find the row of a call that has the pipeline's negative prompt while guidance is on."""
    c = convention
    if "negative_prompt" not in watched.options:
        return None
    scales = [name for name, value in c.extra.items() if value is not None]
    for extra in ({}, *({**c.extra, name: 3.0} for name in scales)):
        for place in range(MOST_CALLS):
            answers = Answers(lambda _: c.output, stops_at=place)
            try:
                drawn = [watched.draw(PROMPTS[0], c.size, answers, negative_prompt=t, **extra) for t in NEGATIVE]
            except CannotDraw:  # a scale that this pipeline does not take, or more rows than were measured
                break
            a, b = (trace.calls[-1] for trace in drawn)
            rows = find_rows(c, leaves(a.kwargs), leaves(b.kwargs)) if a.step == 0 else []
            if len(rows) == 1:
                return Unconditional(with_negative_prompt(watched, c, extra, answers), place, rows[0])
    return None


def with_negative_prompt(
    watched: Watched, convention: Convention, extra: Mapping[str, Any], answers: Answers
) -> Mapping[str, Any]:
    """Return the options with which a pipeline draws with its negative prompt: an empty one if it fails on its own
    default, as EasyAnimate's."""
    try:
        watched.draw(PROMPTS[0], convention.size, answers, **extra)
    except CannotDraw:
        return {**extra, "negative_prompt": ""}
    return extra


def find_rows(convention: Convention, a: Mapping[Path, Any], b: Mapping[Path, Any]) -> list[int | None]:
    """Return the rows whose text differs between two calls, [None] for a call with only one prompt."""
    changed = [path for path in convention.text if path in a and path in b and not is_same(a[path], b[path])]
    num_rows = a[convention.latents].shape[0] if isinstance(convention.latents[-1], str) else 1
    if num_rows == 1 or not changed:
        return [None] if changed else []
    # With one call for both prompts, a row of every text argument is the negative prompt's.
    if not all(isinstance(a[path], Tensor) and a[path].shape[:1] == (num_rows,) for path in convention.text):
        return []
    return [row for row in range(num_rows) if not torch.equal(a[changed[0]][row], b[changed[0]][row])]
