"""Applies a step's gradients: clip, optimizer step, report.

Whether a step is finite is known only after the device has computed it. If the optimizer can skip a step by a flag on
the device, the host queues the next step meanwhile and reads the result just before the next update. Results are
identical: each learning rate still follows from all steps before it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.base.errors import UserError, about
from library.base.randomness import stream_seed
from library.memory.offload.readback import Readback
from library.training.failures.nonfinite import NonFiniteGuard
from library.training.optimization.rounding import stochastic_rounding
from library.training.reporting.console_lines import LimitedNorms
from library.training.reporting.step_events import StepResult
from library.training.run_parts import Run
from library.training.step.accumulation import Window

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingStep:
    """A step that is computed and not reported yet."""

    window: Window
    numbers: Readback  # losses and gradient norm
    rates: list[float]
    limited: Readback | None
    is_judged: bool  # whether the guard has checked it


class Updates:
    """Updates the weights step by step and reports each step once.

    A non-finite step is skipped: weights, their average, optimizer and learning rate stay as they are.
    """

    def __init__(
        self, run: Run, guard: NonFiniteGuard, norm_limit: float | None, report: Callable[[StepResult], None]
    ) -> None:
        """`norm_limit` is the limit of --scale_weight_norms."""
        self._run, self._guard, self._norm_limit, self._report = run, guard, norm_limit, report
        self._last: PendingStep | None = None
        self.reports_late = skips_by_itself(run)

    def apply(self, window: Window, losses: Tensor) -> None:
        """Clip the gradients of `window`, update the weights and clear the gradients; `losses` are those of its
        batches.

        The previous step must have been reported. Raises NonFiniteError if the run should end.
        """
        assert self._last is None
        run, optimizer, scaler = self._run, self._run.optimization.optimizer, self._run.optimization.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        rates = [float(rate) for rate in run.optimization.schedule.get_last_lr()]
        run.norms.measure(optimizer, window.step)
        numbers, is_taken = self._update(window, losses)
        limited = None
        if self._norm_limit is not None:
            # After the optimizer step. sd-scripts limits norms after every batch that a step accumulates.
            limited = Readback(run.context.network.limit_norms(self._norm_limit, run.context.device))
        if is_taken:
            self._finish_step()
        self._last = PendingStep(window, numbers, rates, limited, is_judged=not self.reports_late)

    def report(self) -> None:
        """Report the last step if that is pending, and advance the learning rate.

        Raises NonFiniteError if the run should end.
        """
        if self._last is None:
            return
        pending, self._last = self._last, None
        if not pending.is_judged and self._allows(pending.window, pending.numbers):
            self._finish_step()
        *losses, norm = pending.numbers.read()
        limited = None
        if pending.limited is not None:
            count, mean, maximum = pending.limited.read()
            limited = LimitedNorms(int(count), mean, maximum)
        self._report(StepResult(pending.window, losses, norm, pending.rates, limited))

    @contextmanager
    def reported_at_end(self) -> Iterator[None]:
        """Report a pending step when the block ends, even by an error, so that what is saved then includes it."""
        try:
            yield
        except Exception:
            try:
                self.report()
            except UserError:  # a damaged step takes precedence
                raise
            except Exception as second:
                logger.debug("the last step could not be reported either:", exc_info=second)
            raise
        self.report()

    def _finish_step(self) -> None:
        """Advance what follows from a step that was not skipped; the weights are still those after it."""
        optimization = self._run.optimization
        optimization.schedule.step()
        if optimization.average is not None:
            optimization.average.update()

    def _update(self, window: Window, losses: Tensor) -> tuple[Readback, bool]:
        """Return the losses and the gradient norm, and True if the step is known to be taken."""
        run, optimizer, scaler = self._run, self._run.optimization.optimizer, self._run.optimization.scaler
        parameters = run.context.network.trainable_parameters()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        values = torch.cat([losses.to(norm.device), norm.float().view(1)])
        # Losses and norm travel together: the host reads from the device once per step.
        numbers, is_taken = Readback(values), False
        if self.reports_late:
            with left_out_if(optimizer, (~values.isfinite()).any()):
                self._step_optimizer(parameters, norm, window.step)
        elif self._allows(window, numbers):
            run.context.network.note_gradients()
            self._step_optimizer(parameters, norm, window.step)
            is_taken = True
        if scaler is not None:
            # Also after a skipped step: it halves the loss scale once `unscale_` has found an overflow.
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return numbers, is_taken

    def _allows(self, window: Window, numbers: Readback) -> bool:
        *losses, norm = numbers.read()
        return self._guard.allows_step(window, losses, norm)

    def _step_optimizer(self, parameters: list[nn.Parameter], norm: Tensor, step: int) -> None:
        run, scaler = self._run, self._run.optimization.scaler
        max_norm = run.options.optimizer.max_grad_norm
        if max_norm != 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        with round_weights(run, step):
            if scaler is not None:
                scaler.step(run.optimization.optimizer)
            else:
                run.optimization.optimizer.step()


def skips_by_itself(run: Run) -> bool:
    """Return True if the optimizer can skip a step by a flag on the device and nothing else must know beforehand.

    Loss scaling reads the flag on the host, and a network that inspects gradients must see finite ones only.
    """
    optimizer, network = run.optimization.optimizer, run.context.network
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    can_skip = is_fused and getattr(optimizer, "_step_supports_amp_scaling", False)
    return can_skip and run.optimization.scaler is None and not network.looks_at_gradients


@contextmanager
def left_out_if(optimizer: Optimizer, is_damaged: Tensor) -> Iterator[None]:
    """Make a fused optimizer's step in the block change nothing, not even its step count, if `is_damaged` is true."""
    fused: Any = optimizer
    # GradScaler sets this attribute too; torch's fused kernels leave everything unchanged if it is 1.
    fused.found_inf = is_damaged.float()
    try:
        yield
    finally:
        del fused.found_inf


def round_weights(run: Run, step: int) -> AbstractContextManager[None]:
    """Round the weights stochastically after optimizer step `step`, if requested."""
    if not (run.options.optimizer.stochastic_rounding and run.options.precision.full_bf16):
        return nullcontext()
    device = run.context.device
    # Seeded by step, so that a resumed run rounds as the uninterrupted one.
    generator = torch.Generator(device).manual_seed(stream_seed(run.context.seed, "rounding", step))
    return stochastic_rounding(run.context.network.trainable_parameters(), generator)


def resolve_norm_limit(run: Run) -> float | None:
    """Return the limit of weight norms; None without one, or with a warning if the network does not support it.

    Raises UserError for a negative limit.
    """
    limit = run.options.network.scale_weight_norms
    if not limit:
        return None
    if limit < 0:
        raise about("--scale_weight_norms")(f"is {limit:g}; a norm is at least 0, and 0 sets no limit")
    if not run.context.network.can_limit_norms:
        logger.warning(
            "--scale_weight_norms has no effect: the network of %s has no apply_max_norm_regularization()",
            run.options.network.network_module,
        )
        return None
    return limit
