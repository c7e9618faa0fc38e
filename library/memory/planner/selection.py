"""The rule by which the planner chooses among candidates. Needs no torch."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from library.memory.planner.gpus import GIB, Gpu

WORTH = 0.15  # share of time that a mode must save to beat a more exact or simpler one
SPARE_BYTES, SPARE_SHARE = GIB // 2, 0.05  # the larger is left free; predicted memory is not more accurate
LAST_RESORT = "nf4"  # a weight format that is chosen only where no other fits: its error is many times theirs


class Candidate(Protocol):
    """A configuration with its predicted memory and time."""

    @property
    def device_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def error(self) -> float | None: ...
    @property
    def weight_format(self) -> str | None: ...
    @property
    def complexity(self) -> int: ...


CandidateT = TypeVar("CandidateT", bound=Candidate)


def spare_bytes(gpu: Gpu) -> int:
    """Return the bytes of a GPU that a configuration should leave free."""
    return max(SPARE_BYTES, int(SPARE_SHARE * gpu.memory_bytes))


def fits(candidate: Candidate, gpu: Gpu) -> bool:
    """Return True if a candidate fits the GPU and main memory."""
    return candidate.device_bytes <= gpu.memory_bytes and candidate.host_bytes <= gpu.main_memory_bytes


def select(candidates: Sequence[CandidateT], gpu: Gpu) -> CandidateT | None:
    """Choose among the candidates that leave the spare, else take the one that leaves most; None if none fits.

    Within `WORTH` of the fastest time the smallest error of the weights wins, then the simplest candidate, then the
    faster or smaller one.
    """
    fitting = [candidate for candidate in candidates if fits(candidate, gpu)]
    fitting = [candidate for candidate in fitting if candidate.weight_format != LAST_RESORT] or fitting
    spare = [c for c in fitting if c.device_bytes <= gpu.memory_bytes - spare_bytes(gpu)]
    spare = spare or sorted(fitting, key=lambda candidate: candidate.device_bytes)[:1]
    least_s = min((candidate.seconds for candidate in spare), default=0.0)
    near = [candidate for candidate in spare if candidate.seconds <= (1 + WORTH) * least_s]
    return min(near, key=lambda c: (c.error or 0.0, c.complexity, c.seconds, c.device_bytes), default=None)


def offload_for_spare(predict: Callable[[int], CandidateT], most: int, gpu: Gpu) -> CandidateT:
    """Return the prediction with the fewest offloaded blocks that leave the spare, or with as many as main memory
    holds."""
    prediction = predict(0)
    # As few blocks as possible, because each needs main memory that can be pinned.
    for num_offloaded in range(1, most + 1):
        if prediction.device_bytes <= gpu.memory_bytes - spare_bytes(gpu):
            break
        more = predict(num_offloaded)
        if more.host_bytes > gpu.main_memory_bytes:
            break
        prediction = more
    return prediction
