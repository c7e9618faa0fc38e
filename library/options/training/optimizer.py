"""The optimizer."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import SHARE, number, steps, whole


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The optimizer."""

    optimizer_type: str = option("", usual=True, short_name="")
    """Optimizer by name, such as AdamW8bit, Lion, Prodigy or Adafactor, or by dotted path of a class. Empty is
    AdamW."""
    use_8bit_adam: bool = option(False)
    """Old name of --optimizer_type AdamW8bit."""
    use_lion_optimizer: bool = option(False)
    """Old name of --optimizer_type Lion."""
    # sd-scripts' default, which is for training whole models and low for a LoRA.
    learning_rate: float = option(2e-06, on_resume="new rate", usual=True, kind=number(0), short_name="lr")
    """Learning rate, where --unet_lr and --text_encoder_lr do not say otherwise. 1e-4 is usual for LoRA."""
    max_grad_norm: float = option(1.0, usual=True, kind=number(0), short_name="clip")
    """Largest norm of the gradient over all trained weights; larger gradients are clipped to it. 0 never clips."""
    optimizer_args: list[str] | None = option(None, on_resume="kept by the optimizer", usual=True, nargs="*")
    """Further settings of the optimizer as key=value, separated by spaces, such as weight_decay=0.01 betas=0.9,0.99."""
    stochastic_rounding: bool = option(False, needs="full_bf16")
    """Round the weights of an adapter in bf16 up or down at random after each step, so that steps too small for bf16
    count on average. The optimizer computes and remembers in float32."""
    fused_backward_pass: bool = option(
        False,
        ignored="it frees each gradient as soon as it is used, which saves gigabytes in full fine-tuning; the "
        "gradients of an adapter are as small as the adapter",
    )
    """Has no effect: it saves the memory of gradients, which are as small as the adapter."""


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """The learning rate over the run."""

    lr_scheduler: str = option("constant", usual=True, short_name="")
    """How the learning rate changes over the run: constant, constant_with_warmup, linear, cosine, cosine_with_restarts,
    polynomial, and more."""
    lr_scheduler_type: str = option("", short_name="")
    """Schedule by the name of a class of torch.optim.lr_scheduler, or by dotted path. Empty goes by --lr_scheduler."""
    lr_scheduler_args: list[str] | None = option(None, nargs="*")
    """Further settings of the schedule as key=value, separated by spaces."""
    lr_warmup_steps: int | float = option(0, usual=True, kind=steps(0), short_name="warmup")
    """Steps over which the learning rate rises from 0: a whole number, or a share of the run such as 0.1. 0 starts at
    the full rate."""
    lr_decay_steps: int | float = option(0, kind=steps(0), short_name="decay")
    """Steps over which warmup_stable_decay lowers the learning rate at the end: a whole number, or a share of the run
    below 1."""
    lr_scheduler_num_cycles: int = option(1, usual=True, kind=whole(1), short_name="cycles")
    """Number of restarts of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay."""
    lr_scheduler_power: float = option(1, kind=number(0), short_name="power")
    """Exponent of the polynomial schedule. 1 falls in a straight line."""
    lr_scheduler_timescale: int | None = option(None, kind=whole(1), short_name="timescale")
    """Steps that set the pace of inverse_sqrt. Unset uses the warm-up, or 10000 without one."""
    lr_scheduler_min_lr_ratio: float | None = option(None, kind=SHARE, short_name="minlr")
    """Learning rate at the end as a share of that at the start, for cosine_with_min_lr, warmup_stable_decay and rex
    (unset: 0.01)."""
