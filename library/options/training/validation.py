"""Options for measuring the loss on held-out images."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import whole


@dataclass(frozen=True)
class ValidationOptions(Options, needs_images=True):
    """Measuring the loss on images that are not trained on."""

    validation_seed: int | None = option(None, kept_in_state=True)
    """Number that fixes which images are set aside for validation, and the noise they are measured with. Unset uses
    --seed."""
    validation_split: float = option(
        0.0, excludes={"dataset_class": "its images are not known one by one"}, usual=True, kept_in_state=True
    )
    """Share of the images that is set aside to measure the loss on, 0 to 1. 0 sets none aside."""
    validate_every_n_steps: int | None = option(
        None, usual=True, kind=whole(1), affects_training=False, zero_is_unset=True
    )
    """Measure the validation loss every N steps."""
    validate_every_n_epochs: int | None = option(None, kind=whole(1), affects_training=False, zero_is_unset=True)
    """Measure the validation loss every N epochs. Without it and --validate_every_n_steps, after every epoch."""
    validate_at_first: bool = option(False, affects_training=False)
    """Measure the validation loss before the first step too, to compare the others with."""
    max_validation_steps: int | None = option(None, kind=whole(1), affects_training=False, zero_is_unset=True)
    """Maximum number of batches to measure the validation loss on. Unset uses all."""
    early_stop_patience: int | None = option(None, kind=whole(1), affects_training=False)
    """End the run, and save, after N validations in a row that are each worse than the best one by more than chance.
    Unset trains to the end."""
    keep_best_checkpoint: bool = option(False, usual=True, affects_training=False)
    """Keep the weights with the lowest validation loss so far in a file of their own, <name>-best."""
