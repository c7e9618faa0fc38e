"""Choice of a configuration that fits into GPU memory: the fastest, unless a simpler one is almost as fast."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from library.memory.offload.ring import NUM_SLOTS
from library.memory.planner.gpus import Gpu
from library.memory.planner.prediction import CountedStep, MemoryMode, Predicted, predict

WORTH = 0.1  # share of time that a mode must save to beat a simpler one; predicted times are not more accurate


@dataclass(frozen=True)
class Allowed:
    """The search space; options that the user set are fixed."""

    weight_formats: Sequence[str | None] = (None,)
    recompute_every: Sequence[int | None] = (None, 3, 2, 1)
    offloads_inputs: Sequence[bool] = (False, True)
    num_offloaded: int | None = None  # None: chosen by the planner
    shared_by: int = 1  # processes; with more than one, no block is offloaded
    num_slots: int = NUM_SLOTS  # of offloaded blocks on the device

    def modes(self) -> Iterator[MemoryMode]:
        """Yield every combination, with the fixed number of offloaded blocks or none."""
        for weight_format in self.weight_formats:
            for every in self.recompute_every:
                # Without recomputation no block inputs are kept that could be offloaded.
                for wait in self.offloads_inputs if every is not None else (False,):
                    count = self.num_offloaded or 0
                    yield MemoryMode(weight_format, every, wait, count, self.shared_by, self.num_slots)


@dataclass(frozen=True)
class Choice:
    """All candidates on a GPU, each with the fewest offloaded blocks that make it fit, and the chosen candidate."""

    gpu: Gpu
    candidates: tuple[Predicted, ...]
    chosen: Predicted | None  # None if nothing fits

    @property
    def least(self) -> Predicted:
        """The candidate that needs the least memory."""
        return min(self.candidates, key=lambda candidate: candidate.device_bytes)


def choose(step: CountedStep, allowed: Allowed, gpu: Gpu, correction: float = 1.0) -> Choice:
    """Choose the simplest candidate within `WORTH` of the fastest time; of equals, the faster or smaller one."""
    predictions = [fit_mode(step, mode, allowed, gpu, correction) for mode in allowed.modes()]
    # Inputs that cannot be pinned make the host wait for each of them, so the planner does not choose this by itself.
    candidates = tuple(p for p in predictions if p.pins_inputs or all(allowed.offloads_inputs))
    fitting = [candidate for candidate in candidates if candidate.device_bytes <= gpu.memory_bytes]
    least_s = min((candidate.seconds for candidate in fitting), default=0.0)
    near = [candidate for candidate in fitting if (1 - WORTH) * candidate.seconds <= least_s]
    chosen = min(
        near, key=lambda candidate: (candidate.mode.complexity, candidate.seconds, candidate.device_bytes), default=None
    )
    return Choice(gpu, candidates, chosen)


def fit_mode(step: CountedStep, mode: MemoryMode, allowed: Allowed, gpu: Gpu, correction: float) -> Predicted:
    """Predict a mode with the fewest offloaded blocks that make it fit, or with the maximum if it does not fit.

    A fixed number of offloaded blocks is kept, and a sharded model offloads none.
    """
    prediction = predict(step, mode, gpu, correction)
    if allowed.num_offloaded is not None or allowed.shared_by > 1:
        return prediction
    # As few blocks as possible, because each needs main memory that can be pinned.
    for num_offloaded in range(1, step.most_offloaded + 1):
        if prediction.device_bytes <= gpu.memory_bytes:
            break
        prediction = predict(step, replace(mode, num_offloaded=num_offloaded), gpu, correction)
    return prediction
