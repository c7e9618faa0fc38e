"""What is told of a step, and the norms that are measured for it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum, isfinite, nan
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from library.training.reporting.events import Memory, Norms, Step, Timing
from library.training.reporting.step_times import StepTimes

EVERY = 10  # steps; norms of groups read each weight and gradient once more


@dataclass
class NormMeter:
    """Norms of weights and gradients by group of the optimizer, of every tenth step from the first on.

    They are measured on the device without waiting for it, and read when the step is told.
    """

    is_on: bool = False
    total: float = nan  # of the last step's gradient, unclipped
    _pairs_G2: Any = field(default=None, repr=False)  # G groups, (weight, gradient)

    def measure(self, optimizer: Optimizer, step: int) -> None:
        """To be called while the gradients of the step after `step` finished ones are there, unclipped."""
        self._pairs_G2 = None
        if not self.is_on or step % EVERY:
            return
        pairs = []
        for group in optimizer.param_groups:
            weights = [p.detach() for p in group["params"]]
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            pairs.append(torch.stack([norm_of(weights), norm_of(gradients)]))
        self._pairs_G2 = torch.stack([pair.to(pairs[0].device) for pair in pairs]) if pairs else None

    def read(self, names: Sequence[str]) -> dict[str, Norms] | None:
        """By name of the group; None for a step that was not measured."""
        pairs_G2, self._pairs_G2 = self._pairs_G2, None
        if pairs_G2 is None:
            return None
        return {name: Norms(*pair) for name, pair in zip(names, pairs_G2.tolist(), strict=False)}


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """One number for all of them, float32."""
    return get_total_norm(tensors).float() if tensors else torch.zeros(())


def told_step(
    step: int,
    epoch: int,
    losses: Sequence[float],
    average: float,
    rates: Sequence[float],
    names: Sequence[str],
    meter: NormMeter,
    times: StepTimes,
) -> Step:
    """The event of a step that is finished; `losses` are its batches', `rates` and `names` those of the groups."""
    norms = meter.read(names)
    return Step(
        step=step,
        epoch=epoch,
        loss=fsum(losses) / len(losses) if all(map(isfinite, losses)) else nan,
        average=average,
        learning_rates=dict(zip(names, rates, strict=False)),
        gradient_norm=meter.total,
        timing=timing_of(times, step - 1),
        norms=norms,
        memory=None if norms is None else memory_of(times.device),
    )


def timing_of(times: StepTimes, step: int) -> Timing | None:
    """The times of `step`, the last one that is settled; None before there is one."""
    if (found := times.last) is None or found.seconds <= 0:
        return None
    speed = found.flops / found.seconds if found.flops else None
    return Timing(
        step=step,
        seconds=found.seconds,
        parts={str(name): seconds for name, seconds in found.parts.items()},
        pictures_per_second=found.num_pictures * times.num_processes / found.seconds,
        tflops=None if speed is None else speed / 1e12,
        mfu=None if speed is None or times.peak is None else speed / times.peak,
    )


def memory_of(device: torch.device) -> Memory:
    """What is taken by now, and at most so far."""
    is_cuda = device.type == "cuda"
    return Memory(
        card=torch.cuda.memory_allocated(device) if is_cuda else None,
        card_peak=torch.cuda.max_memory_allocated(device) if is_cuda else None,
        main_peak=peak_of_main_memory(),
    )


def peak_of_main_memory() -> int | None:
    """Bytes; None where the system does not tell, as Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
