"""Choice of a configuration that fits: of those that are almost as fast as the fastest, the most exact and simplest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from library.memory.offload.ring import NUM_SLOTS
from library.memory.planner.gpus import GIB, Gpu
from library.memory.planner.prediction import CountedStep, MemoryMode, Predicted, predict

WORTH = 0.15  # share of time that a mode must save to beat a more exact or simpler one
SPARE_BYTES, SPARE_SHARE = GIB // 2, 0.05  # the larger is left free; predicted memory is not more accurate
LAST_RESORT = "nf4"  # a weight format that is chosen only where no other fits: its error is many times theirs


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
    """All candidates on a GPU, each with the fewest offloaded blocks that leave the spare, and the chosen candidate."""

    gpu: Gpu
    candidates: tuple[Predicted, ...]
    chosen: Predicted | None  # None if nothing fits

    @property
    def least(self) -> Predicted:
        """The candidate that needs the least memory."""
        return min(self.candidates, key=lambda candidate: candidate.device_bytes)

    @property
    def lacks_spare(self) -> bool:
        """Whether the chosen candidate fits, but leaves less free than it should."""
        return self.chosen is not None and self.chosen.device_bytes > self.gpu.memory_bytes - spare_bytes(self.gpu)


def spare_bytes(gpu: Gpu) -> int:
    """Return the bytes of a GPU that a configuration should leave free."""
    return max(SPARE_BYTES, int(SPARE_SHARE * gpu.memory_bytes))


def fits(candidate: Predicted, gpu: Gpu) -> bool:
    """Return True if a candidate fits the GPU and main memory."""
    return candidate.device_bytes <= gpu.memory_bytes and candidate.host_bytes <= gpu.main_memory_bytes


def choose(step: CountedStep, allowed: Allowed, gpu: Gpu, correction: float = 1.0) -> Choice:
    """Choose among the candidates that leave the spare, else take the one that leaves most.

    Within `WORTH` of the fastest time the smallest error of the weights wins, then the simplest candidate, then the
    faster or smaller one.
    """
    predictions = [fit_mode(step, mode, allowed, gpu, correction) for mode in allowed.modes()]
    # Inputs that cannot be pinned make the host wait for each of them, so the planner does not choose this by itself.
    candidates = tuple(p for p in predictions if p.pins_inputs or all(allowed.offloads_inputs))
    fitting = [candidate for candidate in candidates if fits(candidate, gpu)]
    fitting = [candidate for candidate in fitting if candidate.mode.weight_format != LAST_RESORT] or fitting
    spare = [c for c in fitting if c.device_bytes <= gpu.memory_bytes - spare_bytes(gpu)]
    spare = spare or sorted(fitting, key=lambda candidate: candidate.device_bytes)[:1]
    least_s = min((candidate.seconds for candidate in spare), default=0.0)
    near = [candidate for candidate in spare if candidate.seconds <= (1 + WORTH) * least_s]
    return Choice(gpu, candidates, min(near, key=preference, default=None))


def preference(candidate: Predicted) -> tuple[float, ...]:
    return candidate.error or 0.0, candidate.mode.complexity, candidate.seconds, candidate.device_bytes


def fit_mode(step: CountedStep, mode: MemoryMode, allowed: Allowed, gpu: Gpu, correction: float) -> Predicted:
    """Predict a mode with the fewest offloaded blocks that leave the spare, or with as many as main memory holds.

    A fixed number of offloaded blocks is kept, and a sharded model offloads none.
    """
    prediction = predict(step, mode, gpu, correction)
    if allowed.num_offloaded is not None or allowed.shared_by > 1:
        return prediction
    # As few blocks as possible, because each needs main memory that can be pinned.
    for num_offloaded in range(1, step.most_offloaded + 1):
        if prediction.device_bytes <= gpu.memory_bytes - spare_bytes(gpu):
            break
        more = predict(step, replace(mode, num_offloaded=num_offloaded), gpu, correction)
        if more.host_bytes > gpu.main_memory_bytes:
            break
        prediction = more
    return prediction
