"""Detects NaN or infinite losses and gradients, explains them, skips the step, and ends the run if they persist.

A step is damaged if a loss of its batches or its gradient norm is not finite. Clipping needs that norm anyway, so
detection costs one read per step. A damaged step is skipped: weights, optimizer and learning rate keep their values. It
is still counted, so that the length of the run and the file names do not depend on it; accelerate does the same for
steps that fp16 scaling skips.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

from library.base.errors import UserError, list_few
from library.training.failures.nonfinite_trace import find_first_damage
from library.training.run_parts import Run
from library.training.saving.checkpoints import NonFiniteWeights, Writer, weights_are_finite
from library.training.saving.rescue import NotWrittenError
from library.training.step.accumulation import Window
from library.training.step.losses import add_noise_to

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 5  # consecutive damaged steps that `on_nonfinite=skip` tolerates
MAX_NAMED = 8  # images in a message
MIN_LOSS_SCALE = 1.0  # overflowing fp16 gradients at a larger loss scale only mean that the scale is too large


class NonFiniteError(UserError):
    """Training cannot continue. `last_good` is (step, epoch) of the last step that changed the weights, or None."""

    def __init__(self, message: str, last_good: tuple[int, int] | None) -> None:
        super().__init__(message)
        self.last_good = last_good


@dataclass
class NonFiniteGuard:
    """Decides for each step whether it may update the weights, and counts those that may not.

    It sees the losses and gradients of all processes, so all of them decide alike.
    """

    run: Run
    last_good: tuple[int, int] | None = None  # (finished steps including it, epoch)
    num_skipped: int = 0
    num_in_a_row: int = 0
    was_traced: bool = False

    def allows_step(self, window: Window, losses: Sequence[float], norm: float) -> bool:
        """Return True if the step of `window`, with these `losses` and this gradient `norm`, may update the weights.

        Raises NonFiniteError if the run should end.
        """
        losses_are_finite = all(isfinite(loss) for loss in losses)
        if isfinite(norm) and losses_are_finite:
            self.last_good, self.num_in_a_row = (window.step + 1, window.epoch), 0
            return True
        scaler = self.run.optimization.scaler
        if losses_are_finite and scaler is not None and scaler.get_scale() > MIN_LOSS_SCALE:  # at the start of a run
            logger.info("step %d is skipped: fp16 gradients overflow, the loss scale is halved", window.step + 1)
            return False
        self.num_skipped += 1
        self.num_in_a_row += 1
        explanation = self.explain(window, losses, norm)
        if not weights_are_finite(self.run.context.network.module):
            raise NonFiniteError(
                f"{explanation}. The adapter's weights are damaged themselves: {advice(self.run)}", None
            )
        if self.run.options.diagnostics.on_nonfinite == "stop":
            raise NonFiniteError(f"{explanation}. --on_nonfinite stop ends the run; {advice(self.run)}", self.last_good)
        if self.num_in_a_row > MAX_IN_A_ROW:
            raise NonFiniteError(
                f"{explanation}. {self.num_in_a_row} steps in a row were not finite; {advice(self.run)}", self.last_good
            )
        logger.warning("%s. The step is skipped: weights and learning rate are unchanged", explanation)
        return False

    def explain(self, window: Window, losses: Sequence[float], norm: float) -> str:
        """Describe a damaged step: its number, images, noise levels, and the module that the trace found."""
        non_finite = {i: loss for i, loss in zip(window.batch_indices, losses, strict=True) if not isfinite(loss)}
        damage = f"loss {next(iter(non_finite.values()))}" if non_finite else f"gradient norm {norm} with a finite loss"
        samples, trace = [], None
        step_of = partial(self.run.plan.step_of, window.epoch)
        for batch_index in non_finite or window.batch_indices:
            # Every draw is a function of the seed and its place, so the batch can be made once more.
            (batch,) = self.run.batches.iterate_epoch(window.epoch, [batch_index], step_of, 0, False)
            batch_number = self.run.plan.batch_number(window.epoch, batch_index)
            timesteps = add_noise_to(self.run.context, batch, batch_number).timesteps_B.tolist()
            samples += [f"{key} (timestep {t:g})" for key, t in zip(batch.keys, timesteps, strict=True)]
            if self.run.options.diagnostics.trace_nonfinite and not self.was_traced:
                trace = find_first_damage(self.run, batch, batch_number, window.step)
                self.was_traced = True
        explanation = f"step {window.step + 1}: {damage}; images: {list_few(samples, MAX_NAMED)}"
        return explanation if trace is None else f"{explanation}; {trace}"

    def report(self, step: int) -> None:
        """Log the number of skipped steps, if any. Raises NonFiniteError if no step was good."""
        if self.num_skipped and self.last_good is None:
            raise NonFiniteError(f"none of {step} steps had a finite loss and gradient; {advice(self.run)}", None)
        if self.num_skipped:
            logger.warning("%d of %d steps were skipped: loss or gradient was not finite", self.num_skipped, step)


def advice(run: Run) -> str:
    if run.options.precision.mixed_precision == "fp16":
        return "fp16 overflows easily: try --mixed_precision bf16, or a lower --learning_rate"
    return "try a lower --learning_rate, and look at the images that are named; --trace_nonfinite names the module"


@contextmanager
def save_last_good(writer: Writer) -> Iterator[None]:
    """If damaged steps end the run, save the adapter as it was after the last good step.

    Damaged weights are never written; earlier files stay.
    """
    try:
        yield
    except NonFiniteError as error:
        if error.last_good is None:
            raise NonFiniteError(f"{error}. Nothing is saved now; earlier files are kept", None) from error
        step, epoch = error.last_good
        message = save_and_describe(writer, writer.names.of_step(step), step, epoch)
        raise NonFiniteError(f"{error}. {message}", error.last_good) from error


def save_and_describe(writer: Writer, path: Path, step: int, epoch: int) -> str:
    """Write the adapter in the main process. Return a sentence about it."""
    if not writer.is_main:
        return "The main process saves the adapter"
    try:
        place = writer.write(path, step, epoch)
    except (NonFiniteWeights, NotWrittenError) as error:
        return str(error)
    return f"The adapter as it was after step {step} is saved as {place}"
