"""The candidates of a counted step on a GPU, and the choice among them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from library.memory.offload.ring import NUM_SLOTS
from library.memory.planner.gpus import Gpu
from library.memory.planner.prediction import CountedStep, MemoryMode, ModeCost, predict
from library.memory.planner.selection import offload_for_spare, select, spare_bytes


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
class ModeChoice:
    """All candidates on a GPU, each with the fewest offloaded blocks that leave the spare, and the chosen candidate."""

    gpu: Gpu
    candidates: tuple[ModeCost, ...]
    chosen: ModeCost | None  # None if nothing fits

    @property
    def least(self) -> ModeCost:
        """The candidate that needs the least memory."""
        return min(self.candidates, key=lambda candidate: candidate.device_bytes)

    @property
    def lacks_spare(self) -> bool:
        """Whether the chosen candidate fits, but leaves less free than it should."""
        return self.chosen is not None and self.chosen.device_bytes > self.gpu.memory_bytes - spare_bytes(self.gpu)


def choose(step: CountedStep, allowed: Allowed, gpu: Gpu, correction: float = 1.0) -> ModeChoice:
    """Choose a configuration by the rule of `select`."""
    predictions = [fit_mode(step, mode, allowed, gpu, correction) for mode in allowed.modes()]
    # Inputs that cannot be pinned make the host wait for each of them, so the planner does not choose this by itself.
    candidates = tuple(p for p in predictions if p.pins_inputs or all(allowed.offloads_inputs))
    return ModeChoice(gpu, candidates, select(candidates, gpu))


def fit_mode(step: CountedStep, mode: MemoryMode, allowed: Allowed, gpu: Gpu, correction: float) -> ModeCost:
    """Predict a mode with the offloaded blocks of `offload_for_spare`.

    A fixed number of offloaded blocks is kept, and a sharded model offloads none.
    """
    if allowed.num_offloaded is not None or allowed.shared_by > 1:
        return predict(step, mode, gpu, correction)
    return offload_for_spare(
        lambda count: predict(step, replace(mode, num_offloaded=count), gpu, correction), step.most_offloaded, gpu
    )
