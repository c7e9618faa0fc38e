"""The learning rate over the run."""

from dataclasses import dataclass

from library.options.base import Options, int_or_float, option


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """The learning rate over the run."""

    lr_scheduler: str = option("constant", help="")
    lr_scheduler_type: str = option("", help="")
    lr_scheduler_args: list[str] | None = option(None, help="", nargs="*")
    lr_warmup_steps: int | float = option(0, help="", type=int_or_float)
    lr_decay_steps: int | float = option(0, help="", type=int_or_float)
    lr_scheduler_num_cycles: int = option(1, help="")
    lr_scheduler_power: float = option(1, help="")
    lr_scheduler_timescale: int | None = option(None, help="")
    lr_scheduler_min_lr_ratio: float | None = option(None, help="")
