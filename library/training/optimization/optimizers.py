"""The optimizers, each from its own library."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from library.base.errors import about, error_in
from library.base.suggestions import did_you_mean
from library.environment.hidden_libraries import BITSANDBYTES
from library.environment.packages import import_needed
from library.options.keyword_args import call_with_keywords, read_keyword_args
from library.options.training.optimizer import OptimizerOptions
from library.training.optimization.muon import MuonWithAdamW
from library.training.optimization.rounding import step_in_float32

logger = logging.getLogger(__name__)

FLAG = "--optimizer_args"
# As in sd-scripts, unless --optimizer_args names another momentum.
NESTEROV = {"momentum": 0.9, "nesterov": True}

KNOWN: dict[str, tuple[str, Mapping[str, Any]]] = {
    "AdamW": ("torch.optim.AdamW", {}),
    "Muon": ("torch.optim.Muon", {}),
    "AdamW8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "PagedAdamW": ("bitsandbytes.optim.PagedAdamW", {}),
    "PagedAdamW8bit": ("bitsandbytes.optim.PagedAdamW8bit", {}),
    "PagedAdamW32bit": ("bitsandbytes.optim.PagedAdamW32bit", {}),
    "Lion": ("lion_pytorch.Lion", {}),
    "Lion8bit": ("bitsandbytes.optim.Lion8bit", {}),
    "PagedLion8bit": ("bitsandbytes.optim.PagedLion8bit", {}),
    "SGDNesterov": ("torch.optim.SGD", NESTEROV),
    "SGDNesterov8bit": ("bitsandbytes.optim.SGD8bit", NESTEROV),
    "DAdaptation": ("dadaptation.experimental.DAdaptAdamPreprint", {}),
    "DAdaptAdamPreprint": ("dadaptation.experimental.DAdaptAdamPreprint", {}),
    "DAdaptAdaGrad": ("dadaptation.DAdaptAdaGrad", {}),
    "DAdaptAdam": ("dadaptation.DAdaptAdam", {}),
    "DAdaptAdan": ("dadaptation.DAdaptAdan", {}),
    "DAdaptAdanIP": ("dadaptation.experimental.DAdaptAdanIP", {}),
    "DAdaptLion": ("dadaptation.DAdaptLion", {}),
    "DAdaptSGD": ("dadaptation.DAdaptSGD", {}),
    "Prodigy": ("prodigyopt.Prodigy", {}),
    "Adafactor": ("transformers.optimization.Adafactor", {}),
    "RAdamScheduleFree": ("schedulefree.RAdamScheduleFree", {}),
    "AdamWScheduleFree": ("schedulefree.AdamWScheduleFree", {}),
    "SGDScheduleFree": ("schedulefree.SGDScheduleFree", {}),
}
"""Names, matched in any case -> (class, arguments that the name implies)."""

FINDS_ITS_RATE = ("prodigyopt.", "dadaptation.")
FREEZES_AT_RATE_0 = ("Prodigy", "DAdaptAdam", "DAdaptAdamPreprint", "DAdaptSGD")  # and fail at other differing rates
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True, eq=False)
class BuiltOptimizer:
    """An optimizer and its properties that affect the run."""

    optimizer: Optimizer
    name: str  # for `ss_optimizer`: the class path, then "(key=value,...)" if it has arguments
    is_schedule_free: bool  # no learning rate schedule, and averaged weights that `eval` swaps in
    has_relative_step: bool  # Adafactor with its own learning rates
    moves_in_float32: bool = False  # `stochastic_rounding`: the state of bf16 weights is float32
    _trained: list[torch.Tensor] = field(default_factory=list)  # the training weights while others are swapped in

    def train(self) -> None:
        """Swap in the training weights, bit for bit those that `eval` replaced.

        The optimizer itself would recompute them from the averaged weights, which rounds; a run would then depend on
        how often it saves.
        """
        if self.is_schedule_free:
            with self._at_its_precision():
                self.optimizer.train()  # type: ignore[attr-defined]
            for parameter, value in zip(self._parameters if self._trained else (), self._trained, strict=True):
                parameter.data.copy_(value)
            self._trained.clear()

    def eval(self) -> None:
        """Swap in the weights that are saved, drawn and validated."""
        if self.is_schedule_free:
            if not self._trained:
                self._trained.extend(parameter.detach().clone() for parameter in self._parameters)
            with self._at_its_precision():
                self.optimizer.eval()  # type: ignore[attr-defined]

    def _at_its_precision(self) -> AbstractContextManager[None]:
        # The optimizer keeps float32 state then, with which a swap of bf16 weights fails.
        return step_in_float32(self._parameters) if self.moves_in_float32 else nullcontext()

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def build_optimizer(options: OptimizerOptions, groups: Sequence[Mapping[str, Any]]) -> BuiltOptimizer:
    """Build the optimizer over `groups`: dicts with "params" and usually "lr", which are not changed.

    A schedule-free optimizer starts in training mode. Raises UserError for an unknown name, a missing library (naming
    what to install), and arguments that are unreadable, unknown or refused.
    """
    optimizer_type = resolve_optimizer_type(options)
    path, implied = class_path(optimizer_type)
    cls = import_optimizer(path, optimizer_type)
    arguments = read_keyword_args(options.optimizer_args, FLAG)
    keywords = {**implied, **arguments}
    parameter_groups = [{**group, "params": list(group["params"])} for group in groups]
    ours: dict[str, Any] = {"lr": options.learning_rate}

    is_adafactor = f"{cls.__module__}.{cls.__qualname__}" == KNOWN["Adafactor"][0]
    has_relative_step = False
    if is_adafactor:
        keywords = adafactor_keywords(arguments)
        has_relative_step = keywords["relative_step"]
    if options.fused_backward_pass and not is_adafactor:
        reason = f"works with --optimizer_type Adafactor only, not {optimizer_type}; leave it out"
        raise about("--fused_backward_pass")(reason)
    if has_relative_step:
        logger.warning(
            "Adafactor with relative_step=True sets its own learning rates: --learning_rate, --unet_lr, "
            "--text_encoder_lr and the rates and ratios of --network_args have no effect; relative_step=False in "
            "--optimizer_args uses them"
        )
        # Adafactor refuses a rate beside relative_step.
        ours["lr"] = None
        for group in parameter_groups:
            group.pop("lr", None)
    elif is_adafactor and options.max_grad_norm != 0:
        logger.info("Adafactor clips updates by itself; --max_grad_norm 0 is the usual setting with it")
    if cls.__module__.startswith(FINDS_ITS_RATE):
        check_rates(parameter_groups, options.learning_rate, cls.__name__)
    if cls is torch.optim.AdamW and can_fuse(parameter_groups, arguments):
        # The fused step can also be skipped by a flag on the device, so the host need not wait for the losses.
        ours["fused"] = True

    listed = ",".join(f"{key}={value}" for key, value in keywords.items())

    def build(groups: Sequence[Mapping[str, Any]]) -> BuiltOptimizer:
        optimizer = call_with_keywords(
            MuonWithAdamW if cls is getattr(torch.optim, "Muon", None) else cls,  # since torch 2.9
            [groups],
            keywords,
            flag=FLAG,
            ours=ours,
            set_elsewhere={"params": "", "lr": "learning_rate"},
        )
        if not can_skip_by_flag(optimizer.param_groups[0]["params"]):
            # Callers, such as GradScaler, then read the flag themselves and leave the step out.
            optimizer._step_supports_amp_scaling = False
        built = BuiltOptimizer(
            optimizer=optimizer,
            name=f"{cls.__module__}.{cls.__qualname__}{f'({listed})' if listed else ''}",
            is_schedule_free=cls.__name__.lower().endswith("schedulefree"),
            has_relative_step=has_relative_step,
            moves_in_float32=options.stochastic_rounding,
        )
        built.train()
        return built

    if torch.are_deterministic_algorithms_enabled():
        check_order_of_sums(build(build_small_groups(parameter_groups)).optimizer, optimizer_type)
    if arguments:
        check_step(build(build_small_groups(parameter_groups)), optimizer_type, arguments)
    return build(parameter_groups)


def build_small_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups with one small matrix each, with the dtype and device of the group's first weight."""
    return [
        {**group, "params": [torch.nn.Parameter(torch.ones(8, 8, dtype=weight.dtype, device=weight.device))]}
        for group in groups
        for weight in group["params"][:1]
    ]


def check_step(built: BuiltOptimizer, optimizer_type: str, arguments: Mapping[str, Any]) -> None:
    """Take one step with small dummy weights.

    Most optimizers check their arguments only in the first step, after models are loaded and caches made. Raises
    UserError naming the arguments.
    """
    optimizer = built.optimizer
    generator = torch.Generator().manual_seed(0)
    devices = [weight.device for weight in built._parameters if weight.device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices):
            for weight in built._parameters:
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
            optimizer.step()
    except Exception as error:
        text = " ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = " ".join(str(error).split())[:200]
        raise about("--optimizer_type")(
            f"{optimizer_type} fails with {FLAG} {text}: {reason}", "change or drop them"
        ) from error


def resolve_optimizer_type(options: OptimizerOptions) -> str:
    """Return the optimizer's name, which older options may set too. Raises UserError if two are named."""
    aliases = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
    given_aliases = [flag for flag in aliases if getattr(options, flag)]
    if len(given_aliases) + bool(options.optimizer_type) > 1:
        names = " and ".join(
            f"--{name}" for name in [*given_aliases, *["optimizer_type"] * bool(options.optimizer_type)]
        )
        raise error_in("--optimizer_type", cause="does not fit")(
            f"{names} name different optimizers", "keep one of them"
        )
    return aliases[given_aliases[0]] if given_aliases else options.optimizer_type or "AdamW"


def class_path(optimizer_type: str) -> tuple[str, Mapping[str, Any]]:
    """Return the class path that `optimizer_type` means, and the arguments that the name implies."""
    # sd-scripts ignores the case of these names, but not that of torch's classes.
    by_lower_case = {name.lower(): entry for name, entry in KNOWN.items()}
    if optimizer_type.lower() in by_lower_case:
        return by_lower_case[optimizer_type.lower()]
    if "." in optimizer_type:
        return optimizer_type, {}
    of_torch = {name for name, value in vars(torch.optim).items() if inspect.isclass(value) and name != "Optimizer"}
    if optimizer_type in of_torch:
        return f"torch.optim.{optimizer_type}", {}
    raise about("--optimizer_type")(
        f"{optimizer_type} is unknown{did_you_mean(optimizer_type, [*KNOWN, *of_torch])}. It may be "
        f"one of {', '.join(KNOWN)}, a class of torch.optim in its exact spelling, or a path such as "
        "package.module.Class"
    )


def import_class(path: str, flag: str, wanted: str) -> type[Any]:
    """Return the class at a dotted path. Raises UserError naming what to install, or what the module lacks."""
    if not all(part.isidentifier() for part in path.split(".")):
        raise about(flag)(f"{wanted} is not a path such as package.module.Class")
    module_name, _, class_name = path.rpartition(".")
    module = import_needed(module_name, flag, wanted)
    value = getattr(module, class_name, None)
    if not inspect.isclass(value):
        raise about(flag)(f"{wanted}: {module_name} has no class {class_name}{did_you_mean(class_name, vars(module))}")
    return value


def import_optimizer(path: str, optimizer_type: str) -> type[Optimizer]:
    cls = import_class(path, "--optimizer_type", optimizer_type)
    if not issubclass(cls, Optimizer):
        raise about("--optimizer_type")(
            f"{optimizer_type}: {path} is not an optimizer (a subclass of torch.optim.Optimizer)"
        )
    if issubclass(cls, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise about("--optimizer_type")(f"{optimizer_type} cannot train an adapter by gradient steps; AdamW can")
    return cls


def adafactor_keywords(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve relative_step in the arguments: on by default, and always with warmup_init."""
    keywords = {"relative_step": True, **arguments}
    if keywords.get("warmup_init") and not keywords["relative_step"]:
        logger.warning("Adafactor with warmup_init=True needs relative_step=True, which is switched on")
        keywords["relative_step"] = True
    return keywords


def check_order_of_sums(optimizer: Optimizer, optimizer_type: str) -> None:
    """Raise UserError for an optimizer whose kernels torch's deterministic mode does not reach and which add in varying
    order: bitsandbytes' sum the norm of an update or gradient with atomic adds where they limit it."""
    settings = getattr(optimizer, "args", None)
    limits_update = getattr(settings, "max_unorm", 0) > 0
    limits_gradient = getattr(settings, "percentile_clipping", 100) < 100  # removed in bitsandbytes 0.50
    if type(optimizer).__module__.startswith(BITSANDBYTES) and (limits_update or limits_gradient):
        argument = "max_unorm" if limits_update else "percentile_clipping"
        raise about("--deterministic", cause="does not fit", others=["--optimizer_type"])(
            f"excludes --optimizer_type {optimizer_type} with {argument}, whose kernels add in varying order",
            f"leave {argument} out of {FLAG}, or use AdamW8bit",
        )


def check_rates(groups: Sequence[Mapping[str, Any]], learning_rate: float, name: str) -> None:
    """Check learning rates for optimizers that estimate one rate for all groups; ours scale it, and should be 1.0."""
    rates = [float(group.get("lr", learning_rate)) for group in groups]
    # The threshold of sd-scripts.
    if max(rates) <= 0.1:
        logger.warning(
            "%s estimates the learning rate itself and multiplies it by the given one, which is %s; use about 1.0",
            name,
            max(rates),
        )
    may_freeze = name in FREEZES_AT_RATE_0
    if len({rate for rate in rates if rate or not may_freeze}) > 1:
        raise error_in("--learning_rate", cause="does not fit")(
            f"{name} estimates one learning rate for all parts, but --learning_rate, --unet_lr, --text_encoder_lr or "
            f"--network_args give {', '.join(map(str, sorted(set(rates))))}; use one value everywhere"
            + (" (0 leaves a part as it is)" if may_freeze else "")
        )


def can_fuse(groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> bool:
    """Return True if torch's fused step supports these parameters and the user has not chosen another one."""
    if any(arguments.get(key) is not None for key in ("fused", "foreach")) or arguments.get("differentiable"):
        return False
    parameters = [p for group in groups for p in group["params"]]
    return all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in parameters)


def can_skip_by_flag(parameters: Sequence[torch.Tensor]) -> bool:
    """Return False if torch's fused step ignores `found_inf`, as its kernels for Apple's GPUs do."""
    return all(parameter.device.type != "mps" for parameter in parameters)


def effective_rates(optimizer: Optimizer, name: str) -> list[float] | None:
    """Return each group's d * lr for optimizers that estimate d (DAdapt*, Prodigy, ProdigyPlus); None for others.

    `name` is `BuiltOptimizer.name`.
    """
    class_name = name.partition("(")[0].rpartition(".")[2].lower()
    estimates_d = class_name.startswith(("dadapt", "prodigy"))
    if not estimates_d or any("d" not in group for group in optimizer.param_groups):
        return None
    return [float(group["d"]) * float(group["lr"]) for group in optimizer.param_groups]
