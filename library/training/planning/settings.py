"""What the planner may choose, as options: which are free, and what a choice sets."""

from typing import Any

from library.memory.planner.choice import Allowed
from library.memory.planner.prediction import Way
from library.options.train import TrainOptions


def values_of(way: Way) -> dict[str, Any]:
    """The options that a way stands for."""
    return {"gradient_checkpointing": way.recompute_every is not None}


def describe(way: Way) -> str:
    """The same as one types them."""
    words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in values_of(way).items() if value]
    return " ".join(words) or "(nothing)"


def allowed_by(options: TrainOptions) -> Allowed:
    """What is left to choose: what the user has set stays."""
    every = (1,) if options.memory.gradient_checkpointing else (None, 1)
    form = options.precision.denoiser_format
    return Allowed(forms=(form,), recompute_every=every, inputs_wait=(False,))
