"""Builds step events and measures their norms."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum, isfinite, nan

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from library.memory.offload.readback import Readback
from library.training.reporting.console_lines import LimitedNorms
from library.training.reporting.events import Memory, Norms, Step, Timing
from library.training.reporting.step_times import StepTimes
from library.training.step.accumulation import Window

EVERY = 10  # steps; norms read all weights and gradients once


@dataclass(frozen=True)
class StepResult:
    """The result of a step, once it is known."""

    window: Window
    losses: list[float]  # of its batches, in their order
    norm: float  # of the whole gradient, before it was clipped
    rates: list[float]  # the learning rate of each group of the optimizer
    limited: LimitedNorms | None


@dataclass
class NormMeter:
    """Norms of weights and gradients per optimizer group, on every tenth step from the first.

    They are computed on the device without synchronization and read when the step is reported.
    """

    is_on: bool = False
    _pairs: Readback | None = field(default=None, repr=False)  # per group: weights, gradient

    def measure(self, optimizer: Optimizer, step: int) -> None:
        """Measure if scheduled; call after backward and before clipping, with `step` finished steps."""
        self._pairs = None
        if not self.is_on or step % EVERY:
            return
        norms = []
        for group in optimizer.param_groups:
            weights = [p.detach() for p in group["params"]]
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norms += [compute_norm(weights), compute_norm(gradients)]
        self._pairs = Readback(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else None

    def read(self, names: Sequence[str]) -> dict[str, Norms] | None:
        """Return the norms by group name; None for a step that was not measured."""
        pairs, self._pairs = self._pairs, None
        if pairs is None:
            return None
        values = pairs.read()
        # A third-party network may name more groups than the optimizer has.
        return {name: Norms(*pair) for name, *pair in zip(names, values[::2], values[1::2], strict=False)}


def compute_norm(tensors: Sequence[Tensor]) -> Tensor:
    return get_total_norm(tensors).float() if tensors else torch.zeros(())


def build_step_event(
    result: StepResult, average: float, names: Sequence[str], meter: NormMeter, times: StepTimes
) -> Step:
    """Build the event of a finished step; `names` are those of the optimizer's groups."""
    norms, step, losses = meter.read(names), result.window.step + 1, result.losses
    return Step(
        step=step,
        epoch=result.window.epoch,
        loss=fsum(losses) / len(losses) if all(map(isfinite, losses)) else nan,
        average=average,
        learning_rates=dict(zip(names, result.rates, strict=False)),
        gradient_norm=result.norm,
        timing=read_timing(times, step - 1),
        norms=norms,
        memory=None if norms is None else measure_memory(times.device),
    )


def read_timing(times: StepTimes, step: int) -> Timing | None:
    """Return the times of `step`, the latest complete measurement; None before the first."""
    if (figures := times.last) is None or figures.seconds <= 0:
        return None
    speed = figures.flops / figures.seconds if figures.flops else None
    return Timing(
        step=step,
        seconds=figures.seconds,
        parts={str(name): seconds for name, seconds in figures.parts.items()},
        pictures_per_second=figures.num_images * times.num_processes / figures.seconds,
        tflops=None if speed is None else speed / 1e12,
        mfu=None if speed is None or times.peak is None else speed / times.peak,
    )


def measure_memory(device: torch.device) -> Memory:
    is_cuda = device.type == "cuda"
    return Memory(
        card=torch.cuda.memory_allocated(device) if is_cuda else None,
        card_peak=torch.cuda.max_memory_allocated(device) if is_cuda else None,
        card_reserved_peak=torch.cuda.max_memory_reserved(device) if is_cuda else None,
        main_peak=peak_of_main_memory(),
    )


def peak_of_main_memory() -> int | None:
    """Return the process's peak memory in bytes; None on systems without it, such as Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, Linux in kilobytes.
    return peak if sys.platform == "darwin" else peak * 1024
