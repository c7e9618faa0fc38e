"""Measuring the loss on pictures that are not trained."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ValidationOptions(Options):
    """Measuring the loss on pictures that are not trained."""

    validation_seed: int | None = option(None, help="")
    validation_split: float = option(0.0, help="")
    validate_every_n_steps: int | None = option(None, help="")
    validate_every_n_epochs: int | None = option(None, help="")
    max_validation_steps: int | None = option(None, help="")
