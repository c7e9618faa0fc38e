"""How long to train, from which seed."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class RunOptions(Options):
    """How long to train, from which seed."""

    max_train_steps: int = option(1600, help="")
    max_train_epochs: int | None = option(None, help="")
    seed: int | None = option(None, help="")
    gradient_accumulation_steps: int = option(1, help="")
