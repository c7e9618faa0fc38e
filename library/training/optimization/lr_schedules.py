"""Learning rate schedules: by name, or third-party classes.

Steps are optimizer steps: `step()` is called once after each, whatever the number of processes. T is their number in
the run.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from library.base.errors import about
from library.base.suggestions import did_you_mean
from library.options.keyword_args import call_with_keywords, read_keyword_args
from library.options.training.optimizer import ScheduleOptions
from library.training.optimization.optimizers import BuiltOptimizer, import_class

logger = logging.getLogger(__name__)

FLAG = "--lr_scheduler_args"
ADAFACTOR = "adafactor"
CONSTANT = "constant"
REX_LAST = 0.01  # share of the learning rate at the end of rex, as in musubi-tuner
WITHOUT_WARMUP = {CONSTANT: "use constant_with_warmup", "piecewise_constant": "write it into step_rules"}
USERS: Mapping[str, Sequence[str]] = {  # option -> the schedules that it belongs to
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay", "rex"),
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
}


class Schedule(Protocol):
    """The interface of a schedule that the loop uses."""

    def step(self) -> None: ...
    def get_last_lr(self) -> list[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def build_schedule(options: ScheduleOptions, built: BuiltOptimizer, max_train_steps: int) -> Schedule:
    """Build the schedule for `max_train_steps` optimizer steps and set the first learning rates.

    Raises UserError for an unknown name and for settings that the schedule does not use or support.
    """
    optimizer, arguments = built.optimizer, read_keyword_args(options.lr_scheduler_args, FLAG)
    warmup_steps = resolve_num_steps(options.lr_warmup_steps, max_train_steps, "--lr_warmup_steps")
    if built.is_schedule_free:
        warn_of_idle_schedule(options, built)
        return RatesOfGroups(optimizer)
    if built.has_relative_step:
        return adafactor_rates(options, built, warmup_steps)
    if options.lr_scheduler_type:
        return schedule_of_class(options, optimizer, arguments, warmup_steps, max_train_steps)
    name = options.lr_scheduler.lower()
    if name.partition(":")[0] == ADAFACTOR:
        raise about("--lr_scheduler")(
            f"{options.lr_scheduler} shows the rates that Adafactor sets itself; it needs "
            "--optimizer_type Adafactor with relative_step=True. Use constant_with_warmup otherwise"
        )
    return build_named_schedule(name, options, optimizer, arguments, warmup_steps, max_train_steps)


def base_rates(optimizer: Optimizer) -> list[float | None]:
    """Return each group's learning rate before a schedule changes it; None if the optimizer sets its own."""
    return [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]


def follow_rates(schedule: Schedule, optimizer: Optimizer, rates: Sequence[float | None]) -> None:
    """Apply this run's rates, from `base_rates`, and the curve for its length to a restored schedule.

    Call after optimizer and schedule are restored; without changes it has no effect.
    """
    if isinstance(schedule, RatesOfGroups) and schedule.refresh is not None:
        return  # the optimizer sets its own rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        old_rate = group.get("initial_lr", group["lr"])
        if rate is None or rate == old_rate:
            continue
        # The ratio keeps the position on the schedule.
        group["lr"] = group["lr"] * rate / old_rate if old_rate else rate
        if "initial_lr" in group:
            group["initial_lr"] = rate
    if isinstance(schedule, LRScheduler):
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        if isinstance(schedule, LambdaLR):  # the curve may belong to another number of steps
            for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
                # The schedule itself would follow its new curve a step late, as it writes rates only when it steps.
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def resolve_num_steps(value: int | float, max_train_steps: int, flag: str) -> int:
    """Return `value` as a number of steps: a fraction of the run below 1, a count otherwise."""
    if value < 0:
        raise about(flag)(f"is {value}; it must not be negative")
    if value < 1:
        return int(value * max_train_steps)
    if value != int(value):
        raise about(flag)(f"is {value}", "use a whole number of steps, or a share of the run below 1.0")
    return int(value)


def build_named_schedule(
    name: str,
    options: ScheduleOptions,
    optimizer: Optimizer,
    arguments: Mapping[str, Any],
    warmup_steps: int,
    max_train_steps: int,
) -> LRScheduler:
    """Build a schedule of transformers or diffusers by name; the arguments are passed to its function."""
    from diffusers.optimization import get_piecewise_constant_schedule
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    decay_steps = resolve_num_steps(options.lr_decay_steps, max_train_steps, "--lr_decay_steps")
    arguments_of = arguments_by_name(options, warmup_steps, decay_steps, max_train_steps)
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    functions |= {"piecewise_constant": get_piecewise_constant_schedule, "rex": build_rex_schedule}
    check_name(name, list(arguments_of))
    check_settings(name, options, arguments, warmup_steps, decay_steps, max_train_steps)
    ours = arguments_of[name]
    if "min_lr" in arguments:
        # transformers refuses both.
        ours.pop("min_lr_rate", None)
    set_elsewhere = {
        "optimizer": "",
        "last_epoch": "",
        "num_training_steps": "max_train_steps",
        "num_warmup_steps": "lr_warmup_steps",
        "num_decay_steps": "lr_decay_steps",
        "num_stable_steps": "lr_decay_steps",
    }
    schedule: LRScheduler = call_with_keywords(
        functions[name], [optimizer], arguments, flag=FLAG, ours=ours, set_elsewhere=set_elsewhere
    )
    return schedule


def arguments_by_name(
    options: ScheduleOptions, warmup_steps: int, decay_steps: int, max_train_steps: int
) -> dict[str, dict[str, Any]]:
    """Return the schedules of --lr_scheduler by name, each with the arguments that it gets from options."""
    warmup, length = {"num_warmup_steps": warmup_steps}, {"num_training_steps": max_train_steps}
    # transformers counts whole waves here (0.5 is its default); the option counts half ones, as in sd-scripts.
    half_waves = {"num_cycles": options.lr_scheduler_num_cycles / 2}
    return {
        CONSTANT: {},
        "constant_with_warmup": warmup,
        "linear": {**warmup, **length},
        "cosine": {**warmup, **length},
        "cosine_with_restarts": {**warmup, **length, "num_cycles": options.lr_scheduler_num_cycles},
        "polynomial": {**warmup, **length, "power": options.lr_scheduler_power},
        "inverse_sqrt": {**warmup, "timescale": options.lr_scheduler_timescale},
        "cosine_with_min_lr": {**warmup, **length, **half_waves, "min_lr_rate": options.lr_scheduler_min_lr_ratio},
        "warmup_stable_decay": {
            **warmup,
            **half_waves,
            "num_stable_steps": max_train_steps - warmup_steps - decay_steps,
            "num_decay_steps": decay_steps,
            "min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0,
        },
        "piecewise_constant": {},
        "rex": {**warmup, **length, "min_lr_ratio": options.lr_scheduler_min_lr_ratio},
    }


def build_rex_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    min_lr_ratio: float | None = None,
    rex_alpha: float = 0.1,
    rex_beta: float = 0.9,
) -> LambdaLR:
    """Build the reflected exponential schedule (REX; Chen et al. 2021, arXiv:2107.04197) with musubi-tuner's constants.

    With z falling from 1 to 0 after the warm-up, the rate falls from 1 to r = `min_lr_ratio` (0.01 if None) of itself:
    r + (1 - r) z / (rex_alpha + rex_beta z). The warm-up rises linearly from r.
    """
    r = REX_LAST if min_lr_ratio is None else min_lr_ratio
    num_falling_steps = num_training_steps - num_warmup_steps

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return r + (1 - r) * step / num_warmup_steps
        if step >= num_training_steps:
            return r
        z = (num_training_steps - step) / num_falling_steps
        return r + (1 - r) * z / (rex_alpha + rex_beta * z)

    return LambdaLR(optimizer, factor)


def check_name(name: str, known: list[str]) -> None:
    """Raise UserError for an unknown schedule, suggesting another name."""
    if name == "reduce_lr_on_plateau":
        raise about("--lr_scheduler", cause="needs")(
            "reduce_lr_on_plateau waits for a validation loss after each step, which training does not have",
            "use cosine, or constant_with_warmup with a lower --learning_rate",
        )
    if name == "cosine_warmup_with_min_lr":
        raise about("--lr_scheduler")(
            "cosine_warmup_with_min_lr is not supported; cosine_with_min_lr with --lr_warmup_steps and "
            "--lr_scheduler_min_lr_ratio gives the same curve but for one step"
        )
    if name not in known:
        raise about("--lr_scheduler")(
            f"{name} is unknown{did_you_mean(name, known)}. It may be one of {', '.join(known)}; "
            "other classes go to --lr_scheduler_type"
        )


def check_settings(
    name: str,
    options: ScheduleOptions,
    arguments: Mapping[str, Any],
    warmup_steps: int,
    decay_steps: int,
    max_train_steps: int,
) -> None:
    """Raise UserError for settings that the schedule does not support; warn of those without effect."""
    if warmup_steps and name in WITHOUT_WARMUP:
        raise about("--lr_warmup_steps")(
            f"is {options.lr_warmup_steps}, but --lr_scheduler {name} has no warm-up; {WITHOUT_WARMUP[name]}"
        )
    if name == "piecewise_constant" and "step_rules" not in arguments:
        raise about("--lr_scheduler", cause="needs")(
            "piecewise_constant needs its rules: --lr_scheduler_args \"step_rules='1:500,0.1'\" is the "
            "full rate for 500 steps and a tenth of it afterwards"
        )
    if (
        name == "cosine_with_min_lr"
        and options.lr_scheduler_min_lr_ratio is None
        and not {"min_lr", "min_lr_rate"} & set(arguments)
    ):
        raise about("--lr_scheduler", cause="needs")(
            "cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, the share of the learning rate that "
            "is left at the end, such as 0.1"
        )
    if warmup_steps + decay_steps > max_train_steps and name == "warmup_stable_decay":
        raise about("--lr_warmup_steps", cause="does not fit", others=["--lr_decay_steps"])(
            f"and --lr_decay_steps are {warmup_steps} and {decay_steps} steps, together more than the "
            f"{max_train_steps} steps of the run",
            "lower one of them",
        )
    if warmup_steps > max_train_steps:
        logger.warning(
            "--lr_warmup_steps is %s steps, but the run ends after %s: the learning rate is never reached",
            warmup_steps,
            max_train_steps,
        )
    for flag, users in USERS.items():
        if getattr(options, flag) != getattr(ScheduleOptions, flag) and name not in users:
            logger.warning(
                "--%s has no effect with --lr_scheduler %s; it belongs to %s", flag, name, " and ".join(users)
            )


def schedule_of_class(
    options: ScheduleOptions,
    optimizer: Optimizer,
    arguments: Mapping[str, Any],
    warmup_steps: int,
    max_train_steps: int,
) -> LRScheduler:
    """Build a third-party schedule as cls(optimizer, **lr_scheduler_args).

    A class that names `num_warmup_steps` or `num_training_steps` gets them, unless the arguments set them.
    """
    name = options.lr_scheduler_type
    if options.lr_scheduler != ScheduleOptions.lr_scheduler:
        logger.warning("--lr_scheduler %s has no effect: --lr_scheduler_type %s wins", options.lr_scheduler, name)
    path = name if "." in name else f"{torch.optim.lr_scheduler.__name__}.{name}"
    cls = import_class(path, "--lr_scheduler_type", name)
    if issubclass(cls, ReduceLROnPlateau):
        check_name("reduce_lr_on_plateau", [])
    parameters = inspect.signature(cls).parameters
    if warmup_steps and ("num_warmup_steps" not in parameters or "num_warmup_steps" in arguments):
        reason = "sets num_warmup_steps" if "num_warmup_steps" in arguments else "has no num_warmup_steps"
        where = FLAG if "num_warmup_steps" in arguments else f"--lr_scheduler_type {name}"
        raise about("--lr_warmup_steps")(
            f"is {options.lr_warmup_steps}, but {where} {reason}", "leave --lr_warmup_steps out"
        )
    ours = {"num_training_steps": max_train_steps} if "num_training_steps" in parameters else {}
    # 0 is "not given", for which the class may have a default of its own.
    if "num_warmup_steps" in parameters and (warmup_steps or is_required(parameters["num_warmup_steps"])):
        ours["num_warmup_steps"] = warmup_steps
    schedule: LRScheduler = call_with_keywords(
        cls, [optimizer], arguments, flag=FLAG, ours=ours, set_elsewhere={"optimizer": "", "last_epoch": ""}
    )
    return schedule


def is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


@dataclass(frozen=True, eq=False)
class RatesOfGroups:
    """Replaces a schedule for optimizers that need none: the rates are those of the groups."""

    optimizer: Optimizer
    refresh: Callable[[Optimizer], None] | None = None  # updates the groups' rates after a step

    def step(self) -> None:
        """Do nothing but update the shown rates."""
        if self.refresh is not None:
            self.refresh(self.optimizer)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the optimizer's state contains the rates."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def show_adafactor_rates(optimizer: Optimizer) -> None:
    """Write Adafactor's rates into its groups, where charts read them; Adafactor does not read them itself.

    Each tensor has its own rate; that of the group's first trained tensor is shown.
    """
    for group in optimizer.param_groups:
        states = (optimizer.state[p] for p in group["params"] if p in optimizer.state)
        state = next(states, None)
        if state is not None:
            group["lr"] = float(optimizer._get_lr(group, state))  # type: ignore[attr-defined]


def adafactor_rates(options: ScheduleOptions, built: BuiltOptimizer, warmup_steps: int) -> RatesOfGroups:
    """Build the replacement for Adafactor with relative_step=True, whatever schedule is named.

    Before the first step the groups show the rate of `adafactor:<rate>`, or 0.
    """
    if warmup_steps:
        raise about("--lr_warmup_steps")(
            f"is {options.lr_warmup_steps}, but Adafactor with relative_step=True sets its own rates",
            "use warmup_init=True in --optimizer_args, or relative_step=False",
        )
    name, _, rate = options.lr_scheduler.lower().partition(":")
    if options.lr_scheduler_type or name not in (ADAFACTOR, CONSTANT):
        logger.warning(
            "--lr_scheduler %s has no effect: Adafactor with relative_step=True sets its own rates",
            options.lr_scheduler_type or options.lr_scheduler,
        )
    try:
        initial_lr = float(rate) if rate and name == ADAFACTOR else 0.0
    except ValueError:
        raise about("--lr_scheduler")(
            f"{options.lr_scheduler}: {rate!r} is not a rate", "write for example adafactor:1e-4"
        ) from None
    for group in built.optimizer.param_groups:
        group["lr"] = initial_lr
    return RatesOfGroups(built.optimizer, show_adafactor_rates)


def warn_of_idle_schedule(options: ScheduleOptions, built: BuiltOptimizer) -> None:
    """Warn of a schedule that a schedule-free optimizer does not use."""
    name = options.lr_scheduler_type or options.lr_scheduler
    if name != CONSTANT or options.lr_warmup_steps or options.lr_scheduler_args:
        logger.warning(
            "%s needs no schedule: --lr_scheduler %s and its settings have no effect. Warm-up is "
            "--optimizer_args warmup_steps=N, where the optimizer has it",
            built.name.partition("(")[0],
            name,
        )
