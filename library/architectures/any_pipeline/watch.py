"""Draws with a pipeline of diffusers and records what its denoiser, its scheduler and its VAE are given.

The pipeline's models are replaced by stand-ins without weights. A call of a stand-in is answered by a value that the
caller chooses, from memory, or by the real model, if that is loaded. So a pipeline of any size can be watched while
only some of its models are in memory, or none.
"""

import copy
import inspect
import linecache
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial, update_wrapper
from hashlib import blake2b
from traceback import walk_tb
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from library.architectures.any_pipeline.refusals import list_other_inputs
from library.architectures.any_pipeline.trees import (
    Output,
    Path,
    copy_tensors,
    leaves,
    map_leaves,
    map_tensors,
    move,
    noted,
)
from library.base.errors import UserError, list_few
from library.environment.packages import describe_fault, describe_lack, is_missing, pip_name_of

logger = logging.getLogger(__name__)

SMALL = 4096  # values of a tensor that a stand-in keeps, such as the VAE's statistics of latents
OFF = ("cache", "rewrite", "use_pe", "upsampling", "enhance", "binning")
"""Parts of the names of options that rewrite the caption, round the size or keep state between steps."""
NUM_FRAMES = ("num_frames", "frames", "video_length")  # names of options
Size = tuple[int, int]  # height, width


class Refused(UserError):
    """The pipeline does something that cannot be measured."""


class WrongSize(Refused):
    """The pipeline does not draw an image of this size."""


class CannotDraw(WrongSize):
    """The pipeline ends in an error of its own."""

    in_model = False  # which may need the blocks that a short one lacks
    in_scheduler = False  # which may not draw in two steps


class Stop(Exception):
    """Ends a drawing early."""


@dataclass(frozen=True)
class DenoiserCall:
    """A call of the denoiser during step number `step`, all arguments by name."""

    name: str
    step: int
    kwargs: dict[str, Any]
    output: Any = None


@dataclass(frozen=True)
class Step:
    """A call of the scheduler's `step`."""

    output: Tensor
    timestep: Any
    sample: Tensor


@dataclass
class Trace:
    """The calls of denoiser, scheduler and VAE while one image was drawn."""

    calls: list[DenoiserCall] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)  # what the VAE decoded
    decoding: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # its other arguments
    pixel_shape: tuple[int, ...] = ()  # of the VAE's output
    scheduler: Any = None  # a copy, as it was at the first step
    schedule: Mapping[str, Any] = field(default_factory=dict)  # the arguments of its `set_timesteps`

    @property
    def mu(self) -> float | None:
        """The shift that the scheduler was given for this size."""
        return None if self.schedule.get("mu") is None else float(self.schedule["mu"])


@dataclass(frozen=True)
class Answers:
    """The values that replace the models' results during a drawing. A function returns None to keep the result."""

    outputs: Callable[[int], Any] | None = None  # for the denoiser's call number i
    samples: Callable[[Tensor], Tensor | None] | None = None  # for the result of each step
    stops_at: int | None = None  # end at this call of the denoiser


def replace_sample(new: Tensor, old: Tensor) -> Tensor:
    """Return `new` in the shape, dtype and device of the sample that it replaces."""
    return new.to(old).expand_as(old)


def describe_package(error: Exception) -> str | None:
    """Return which package a pipeline that ends in this error needs; None if it is about something else."""
    # Pipelines of diffusers leave a name undefined where its import failed.
    if isinstance(error, NameError) and error.name and is_missing(root := imported_from(error)):
        return describe_lack(pip_name_of(root))
    return (describe_fault(error) or "").removeprefix("this ") or None


def own_words(error: Exception) -> str:
    """Return what a pipeline says of its input in a check of its own; "" for an error that Python or torch raises."""
    frame, line = [*walk_tb(error.__traceback__)][-1]
    is_check = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    is_own = isinstance(error, ValueError) and not str(frame.f_globals.get("__name__")).startswith("torch")
    return " ".join(str(error).split())[:300] if is_check and is_own else ""


def fails_in(scheduler: Any, error: Exception) -> bool:
    """Return True for an error in a scheduler's code, and for one about a function or a value that it lacks."""
    is_lack = isinstance(error, AttributeError) and error.obj in (scheduler, scheduler.config)
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    is_called = any(frame.f_code is Followed.__call__.__code__ for frame in frames)
    return is_lack or is_called or any(f.f_globals.get("__name__") == type(scheduler).__module__ for f in frames)


def imported_from(error: NameError) -> str:
    """Return the package that an undefined name is imported from below a condition, else the name: transforms is
    torchvision's."""
    frame = [frame for frame, _ in walk_tb(error.__traceback__)][-1]
    source = "".join(linecache.getlines(frame.f_code.co_filename))
    line = rf"^ *(?:from (\S+) import .*\b{error.name}\b|import (\S+) as {error.name}$)"
    found = re.search(line, source, re.MULTILINE)
    name = str(found[1] or found[2] if found else error.name)
    return name.partition(".")[0]


@contextmanager
def setting(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes inside the block."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def stand_in(module: nn.Module) -> nn.Module:
    """Return a copy whose large tensors hold one zero each, so that it takes no memory, float32, on the CPU.

    Small tensors keep their values, unless they are on the meta device.
    """
    kept: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        value, dtype = tensor.detach(), torch.float32 if tensor.is_floating_point() else tensor.dtype
        if tensor.numel() > SMALL or tensor.is_meta:
            value = torch.zeros((), dtype=dtype).expand(tensor.shape)
        value = value.to("cpu", dtype)
        kept[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(module, kept).eval()


def is_vae(kind: object) -> bool:
    """Return True for a model, or its class, that encodes and decodes images, whatever its name in the pipeline."""
    return all(callable(getattr(kind, name, None)) for name in ("encode", "decode"))


def key_of(*call: Any) -> str:
    """Return a digest of a call of a model."""
    digest = blake2b(digest_size=16)
    for place, leaf in leaves(call).items():
        is_tensor = isinstance(leaf, Tensor)
        digest.update(f"{place} {(leaf.dtype, leaf.shape) if is_tensor else repr(leaf)}".encode())
        if is_tensor:
            values = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Watched:
    """A pipeline of stand-ins that records its drawings.

    `models` are those in memory, by component; `memory` has what text encoders returned, by their input. The pipeline
    computes on the CPU; calls of models are moved to their device and dtype and back.
    """

    def __init__(self, pipe: Any, models: Mapping[str, nn.Module] | None = None) -> None:
        """`pipe` has stand-ins for all of its models."""
        self.pipe, self.models, self.memory = pipe, dict(models or {}), dict[str, Any]()
        self.denoiser: str | None = None  # the component, once it is known
        self.read: set[tuple[str, Path]] | None = None  # notes which outputs in memory are read: (key, path)
        self.idle: tuple[str, ...] = ()  # those that are called beside it in each step
        self.idle_value = 0.0  # of their outputs
        self.stops_at_models = False  # end a drawing at the first call of any model
        self.second = ""  # another denoiser, which draws at some noise levels
        self.load_text: Callable[[str], None] | None = None  # adds one to `models` if its output is not in memory
        self.vae = ""  # the component that encodes and decodes images; "" if the pipeline draws pixels
        self.options: Mapping[str, inspect.Parameter] = inspect.signature(type(pipe).__call__).parameters
        self._bare = dict[str, nn.Module]()  # the stand-ins themselves, which are not watched
        self._trace, self._answers = Trace(), Answers()
        self._modes: list[TorchDispatchMode] = []  # of the caller of `real_tensors`
        pipe.set_progress_bar_config(disable=True)
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module) and is_vae(module):
                self.vae = name
                # A drawing needs no more than the shape of the image.
                module.decode = partial(self._decode, copy.deepcopy(module).to("meta"))  # type: ignore[assignment]
            elif isinstance(module, nn.Module):
                self._bare[name] = copy.deepcopy(module)
                for path, part in module.named_modules():
                    part.forward = partial(self._forward, name, path, part)
        self.own_scheduler = pipe.scheduler
        self.set_scheduler(pipe.scheduler)

    def set_scheduler(self, scheduler: Any) -> None:
        """Draw with a scheduler, whose functions are watched, also those of copies that the pipeline makes of it."""
        self.pipe.scheduler = scheduler
        for name, watched in (("step", self._step), ("set_timesteps", self._set_timesteps)):
            setattr(scheduler, name, Followed(watched, scheduler, name))

    def draw(self, prompt: str, size: Size, answers: Answers | None = None, *, steps: int = 2, **extra: Any) -> Trace:
        """Draw one image of `size` and return what was seen."""
        arguments = {
            "height": size[0], "width": size[1], "num_inference_steps": steps, "output_type": "pt",
            "generator": torch.Generator().manual_seed(1), **dict.fromkeys(NUM_FRAMES, 1),
            "max_area": size[0] * size[1],
            **{k: False for k, p in self.options.items() if isinstance(p.default, bool) and any(w in k for w in OFF)},
        }  # fmt: skip
        known = {name: value for name, value in arguments.items() if name in self.options}
        self._trace, self._answers = Trace(), answers or Answers()
        with self.real_tensors(), torch.no_grad(), suppress(Stop), ExitStack() as stack:
            for part in self.pipe.components.values():
                if isinstance(getattr(part, "_enabled", None), bool):  # diffusers' components for guidance
                    stack.enter_context(setting(part, _enabled=False))
            if getattr(self.pipe, "default_sample_size", None) is not None:
                # Some pipelines draw every shape with the area of their default size, rounded down.
                side = math.sqrt(size[0] * size[1]) * (1 + 1e-6) / getattr(self.pipe, "vae_scale_factor", 8)
                stack.enter_context(setting(self.pipe, default_sample_size=side))
            if getattr(self.pipe, "resolutions", None):  # a list of (width, height), of which the nearest is drawn
                stack.enter_context(setting(self.pipe, resolutions=[size[::-1]]))
            try:
                self.pipe(prompt=prompt, **{**known, **extra})
            except (Stop, UserError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the pipeline's own
                if fault := describe_package(error):
                    raise Refused(f"it {fault}", cause="not installed") from error
                raise self._explain(error, size) from error
        return self._trace

    def _explain(self, error: Exception, size: Size) -> CannotDraw:
        logger.debug("a drawing of %s ended in an error", type(self.pipe).__name__, exc_info=error)
        needs = list_other_inputs(self.options)
        also = f"; it may need {list_few(needs)}, which this script does not give" if needs else ""
        reason = own_words(error) or "its code fails, as --console_log_level DEBUG shows"
        if in_scheduler := fails_in(self.pipe.scheduler, error):
            reason = own_words(error) or f"it does not work with its {type(self.pipe.scheduler).__name__}"
            also = "; use the scheduler_config.json of its publisher"
        failed = CannotDraw(f"it draws no image of {size[1]}x{size[0]} from a caption alone: {reason}{also}")
        failed.in_scheduler = in_scheduler
        failed.in_model = any(f.f_code is Watched.call_model.__code__ for f, _ in walk_tb(error.__traceback__))
        return failed

    def require_drawable(self, sizes: Iterable[Size]) -> None:
        """Draw until the first call of a model, for which none is needed. Raises CannotDraw if the pipeline refuses
        every size before."""
        failure: CannotDraw | None = None
        for size in sizes:
            try:
                with setting(self, stops_at_models=True):
                    self.draw("a cat", size)
                return
            except CannotDraw as error:
                failure = failure or error
        assert failure is not None
        raise failure

    @contextmanager
    def real_tensors(self) -> Iterator[None]:
        """Compute with values inside the block, also while the planner counts on fake tensors."""
        with _disable_current_modes() as modes, setting(self, _modes=modes or self._modes):  # type: ignore[no-untyped-call]
            yield

    def call_model(self, name: str, path: str, arguments: Any) -> Any:
        """Run a part of a model in memory; arguments and result are on the CPU, in float32.

        The result of a model of fake tensors is zeros.
        """
        model = self.models[name]
        like = next(iter(model.parameters()))
        # Autocast converts where it has to; times would lose digits that the model needs.
        converts = like.is_floating_point() and not torch.is_autocast_enabled(like.device.type)
        args, kwargs = move(arguments, like.device, like.dtype if converts else torch.float32)
        with ExitStack() as stack:
            for handle in copy_hooks(getattr(self.pipe, name).get_submodule(path), model.get_submodule(path)):
                stack.callback(handle.remove)
            for mode in reversed(self._modes if is_fake(model) else []):
                _push_mode(mode)
                stack.callback(_pop_mode)
            output = model.get_submodule(path)(*args, **kwargs)
        if is_fake(model):
            output = map_tensors(output, lambda old: torch.zeros(old.shape, dtype=old.dtype))
        return move(output, torch.device("cpu"), torch.float32)

    def _forward(self, name: str, path: str, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.stops_at_models:
            raise Stop
        if name in (self.denoiser, self.second) or (self.denoiser is None and self._trace.steps):
            return self._denoise(name, part, args, kwargs)
        if name in self.idle:
            return self._idle(name, path, args, kwargs)
        key = key_of(name, path, args, kwargs)
        if key not in self.memory:
            if name not in self.models and self.load_text is not None:
                self.load_text(name)
            output = self.call_model(name, path, map_tensors((args, kwargs), Tensor.detach))
            # Language models also return objects, such as their caches.
            kinds = (Tensor, int, float, str)
            self.memory[key] = map_leaves(output, lambda _, leaf: leaf if isinstance(leaf, kinds) else None)
        output = copy_tensors(self.memory[key])
        if self.read is not None:
            output = map_leaves(output, partial(self._note, self.read, key))
        if self.denoiser is None and path == "":  # any model may turn out to be the denoiser
            self._trace.calls.append(DenoiserCall(name, len(self._trace.steps), bind(part, args, kwargs), output))
        return output

    def _note(self, read: set[tuple[str, Path]], key: str, path: Path, leaf: Any) -> Any:
        return noted(leaf, lambda: read.add((key, path))) if isinstance(leaf, Tensor) else leaf

    def _idle(self, name: str, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return an output of the right shape, for which no weights are needed."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            output = self._bare[name].get_submodule(path)(*args, **kwargs)
        return map_tensors(output, lambda old: torch.full(old.shape, self.idle_value, dtype=old.dtype))

    def _denoise(self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace, answers, place = self._trace, self._answers, len(self._trace.calls)
        call = DenoiserCall(name, len(trace.steps), bind(part, args, kwargs))
        trace.calls.append(call)
        if answers.stops_at == place:
            raise Stop
        output = None if answers.outputs is None else answers.outputs(place)
        if output is None:
            output = self.call_model(name, "", (args, kwargs))
        trace.calls[place] = replace(call, output=copy_tensors(output))
        return output

    def _step(self, scheduler: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
        trace, bound = self._trace, inspect.signature(step).bind(*args, **kwargs).arguments
        if not trace.steps:
            trace.scheduler = copy_scheduler(scheduler)
        sample: Tensor = bound["sample"].detach().clone()
        trace.steps.append(Step(bound["model_output"].detach().clone(), copy.deepcopy(bound["timestep"]), sample))
        out, answer = step(*args, **kwargs), self._answers.samples
        new = None if answer is None else answer(sample)
        if new is None:
            return out
        return (new, *out[1:]) if isinstance(out, tuple) else Output({**out, "prev_sample": new})

    def _set_timesteps(self, _: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        self._trace.schedule = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
        return method(*args, **kwargs)

    def _decode(self, vae: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._trace.decoded.append(latents.detach().clone())
        named = {name: value for name, value in kwargs.items() if name not in ("return_dict", "generator")}
        self._trace.decoding = copy_tensors((args, named))
        others, options = move((args, named), torch.device("meta"))
        pixels = torch.zeros(vae.decode(latents.to("meta"), *others, **options)[0].shape)
        self._trace.pixel_shape = tuple(pixels.shape)
        return (pixels,) if kwargs.get("return_dict") is False else Output(sample=pixels)


def copy_hooks(stand_in: nn.Module, model: nn.Module) -> Iterator[RemovableHandle]:
    """Register on the parts of a model the hooks that the pipeline has put on those of its stand-in.

    The stand-in itself is called, so its own hooks act already.
    """
    for path, part in list(stand_in.named_modules())[1:]:
        for hook in part._forward_hooks.values():
            yield model.get_submodule(path).register_forward_hook(hook)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the arguments of a call, by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    named: dict[str, Any] = copy_tensors({**dict(zip(names, args, strict=False)), **kwargs})
    return named


def is_fake(model: nn.Module) -> bool:
    return isinstance(next(iter(model.parameters())), FakeTensor)


class Followed:
    """A function of a scheduler that is watched. A copy of the scheduler has its own; the class stays the scheduler's,
    which some pipelines compare."""

    def __init__(self, watched: Callable[..., Any], scheduler: Any, name: str) -> None:
        self.watched, self.scheduler, self.name = watched, scheduler, name
        self.method = MethodType(getattr(type(scheduler), name), scheduler)
        update_wrapper(self, self.method)  # the pipelines look at the parameters that these functions have

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.watched(self.scheduler, self.method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Followed":
        return Followed(self.watched, memo.get(id(self.scheduler), self.scheduler), self.name)


def copy_scheduler(scheduler: Any) -> Any:
    """Return a copy that is not watched."""
    new = copy.copy(scheduler)
    for name in ("step", "set_timesteps"):
        vars(new).pop(name, None)
    return copy.deepcopy(new)
