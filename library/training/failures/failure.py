"""Errors during training: progress is saved before the run ends."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from library.base.determinism import NotDeterministicError
from library.training.failures.nonfinite import NonFiniteError
from library.training.reporting.progress import Progress
from library.training.saving.checkpoints import NonFiniteWeights, SavedElsewhere, Writer
from library.training.saving.rescue import NotWrittenError
from library.training.step.accumulation import StepPlan

logger = logging.getLogger(__name__)

# Saving failed, or what would be saved is not what was asked for.
NOTHING_TO_SAVE = (NonFiniteError, NotDeterministicError, NonFiniteWeights, NotWrittenError, SavedElsewhere)


class StoppedByError(Exception):
    """A run ended by an error, which is this error's cause, after saving; the message says what was saved and how to
    resume."""


@contextmanager
def save_on_error(writer: Writer, progress: Progress, plan: StepPlan) -> Iterator[None]:
    """Save weights and state if an error ends the run, and raise StoppedByError.

    The error itself is re-raised if no step is finished, if validation had ended the run, on ranks other than 0, and if
    saving fails, which is logged.
    """
    first_step = progress.step
    try:
        yield
    except NOTHING_TO_SAVE:
        raise
    except Exception as error:
        if not writer.is_main or progress.step == first_step or progress.ended:
            raise
        try:
            # The epoch of the last finished step; `epoch_of` takes the number of steps before it.
            message = writer.save_failed(progress, plan.epoch_of(progress.step - 1))
        except Exception as second:  # the cause may prevent saving too; the first error counts
            logger.error("saving failed too: %s: %s", type(second).__name__, second)
            logger.debug("where that failed:", exc_info=second)
            raise error from None
        raise StoppedByError(message) from error
