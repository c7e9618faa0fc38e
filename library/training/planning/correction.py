"""Compares the first steps of a run with the plan, and corrects the plan once."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from library.base.formatting import format_gib
from library.memory.planner.choice import choose
from library.training.models.block_running import choose_block_runner
from library.training.planning.fit import Fit
from library.training.planning.settings import describe, option_values
from library.training.run_parts import Run
from library.types import Batch

logger = logging.getLogger(__name__)

MIB = 2**20
TOLERATED = 0.05  # relative excess over the plan
FIRST_STEP = 2  # from 1; before it, the optimizer has no state


@dataclass(frozen=True)
class Gauge:
    """The peak bytes of tensors on a device since the last reset."""

    peak: Callable[[], int]
    reset: Callable[[], None]


def make_gauge(device: torch.device) -> Gauge | None:
    """Return a gauge; None if torch does not track the device's memory."""
    if device.type != "cuda":
        return None
    return Gauge(lambda: torch.cuda.max_memory_allocated(device), lambda: torch.cuda.reset_peak_memory_stats(device))


class MemoryWatch:
    """Measures each step's peak until the largest batch has run, or until memory exceeds the plan."""

    def __init__(self, run: Run, fitted: Fit, gauge: Gauge) -> None:
        self.is_over = False
        assert fitted.choice.chosen is not None
        self._run, self._fitted, self._chosen, self._gauge = run, fitted, fitted.choice.chosen, gauge
        self._num_steps = 0
        self._largest = (0, 0)

    @classmethod
    def build(cls, run: Run, fitted: Fit | None) -> "MemoryWatch | None":
        """Build a watch; None if nothing was planned or nothing can be measured."""
        gauge = make_gauge(run.context.device)
        return None if fitted is None or gauge is None else cls(run, fitted, gauge)

    def noting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches through, recording their size."""
        for batch in batches:
            self._largest = max(self._largest, self._size(batch))
            yield batch

    def before_step(self) -> None:
        """Reset the peak: previews and validation between steps have their own."""
        if not self.is_over:
            self._gauge.reset()
            self._largest = (0, 0)

    def _size(self, batch: Batch) -> tuple[int, int]:
        """Return the pixels of a batch, and the tokens of its longest caption if they are planned."""
        count = self._run.context.arch.text.count_tokens
        is_counted = not self.is_over and self._fitted.counted.batch.num_tokens is not None
        return num_pixels(batch), max(map(count, batch.captions), default=0) if is_counted else 0

    def after_step(self) -> None:
        """Compare with the plan, once there is a measurement."""
        self._num_steps += 1
        if self.is_over or self._num_steps < FIRST_STEP:
            return
        # Features of captions come with time, and only those that are there are measured.
        kept, measured = self._run.context.captions.num_bytes, self._gauge.peak()
        planned = self._chosen.tensor_bytes - self._fitted.counted.step.feature_bytes + kept
        excess = measured / planned - 1
        planned_batch = self._fitted.counted.batch
        num_tokens = planned_batch.num_tokens or 0
        is_largest = self._largest[0] >= planned_batch.num_pixels and self._largest[1] >= num_tokens
        if excess <= TOLERATED and not is_largest:
            return
        self.is_over = True
        logger.info("memory of a step: %s planned, %s measured", format_gib(planned), format_gib(measured))
        if abs(excess) > TOLERATED:
            direction = "more" if excess > 0 else "less"
            logger.warning("a step takes %.0f %% %s memory than was planned", abs(100 * excess), direction)
            self._correct(measured, planned, kept)

    def _correct(self, measured: int, planned: int, kept: int) -> None:
        """Choose again by the measurement, among options that can change during training: how blocks run. Of both bytes
        `kept` are captions' features."""
        chosen, gpu = self._chosen, self._fitted.choice.gpu
        fixed = chosen.weight_bytes + self._fitted.counted.step.adapter_bytes + kept
        # Weights and adapter have known sizes. What the measurement corrects is the rest, the activations.
        factor = max(0.0, (measured - fixed) / (planned - fixed))
        allowed = replace(
            self._fitted.allowed, weight_formats=(chosen.mode.weight_format,), num_offloaded=chosen.mode.num_offloaded
        )
        choice = choose(self._fitted.counted.step, allowed, gpu, factor)
        if choice.chosen is None:
            remaining_bytes = gpu.memory_bytes - (measured - planned)
            smaller = f"--fit {remaining_bytes // MIB}MB, which leaves as much room"
            logger.warning(
                "nothing that can be changed while training makes it fit %s; where memory runs out, start again with "
                "%s",
                format_gib(gpu.memory_bytes),
                smaller if remaining_bytes > 0 else "smaller images or batches",
            )
        elif choice.chosen.mode == chosen.mode:
            logger.info("keeping the configuration: %s", describe(chosen.mode))
        else:
            context, options = self._run.context, self._run.options.with_values(option_values(choice.chosen.mode))
            choose_block_runner(
                options.memory,
                options.compiling,
                context.trains_text_encoder,
                context.arch,
                context.models,
                context.network,
            )
            need = format_gib(choice.chosen.device_bytes)
            logger.warning("switching to %s, which needs %s", describe(choice.chosen.mode), need)


def num_pixels(batch: Batch) -> int:
    height, width = batch.height_width
    return len(batch.keys) * height * width
