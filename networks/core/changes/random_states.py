"""Independent random streams of several runs on torch's default generators."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

NUM_TICKETS = 2**62

State = tuple[Tensor, ...]
"""State of the CPU generator and, for a CUDA device, of the device's generator."""


class Streams:
    """One random stream for each adapter of a sweep, so that its numbers do not depend on the other adapters.

    A block that is recomputed in the backward pass draws the same numbers again. torch restores its default generator,
    so the call draws the same ticket from it, and the ticket finds the states that the streams had then.
    """

    def __init__(self) -> None:
        self._now: dict[int, State] = {}
        self._before: dict[int, dict[int, State]] = {}  # by ticket: the states at the start of the call

    def start(self, seeds: Mapping[int, int], device: torch.device) -> None:
        """Seed the streams of a batch. The default generators keep their states."""
        # Blocks are recomputed within the batch that they belong to, so older states are never asked for.
        self._before.clear()
        with keep_generators(device):
            for index, seed in seeds.items():
                torch.manual_seed(seed)
                self._now[index] = state_of(device)

    @contextmanager
    def call(self, indices: Sequence[int], device: torch.device) -> Iterator["Call"]:
        """Provide the streams for one call of a layer inside the block, and restore the default generators afterwards.

        The adapters at `indices` draw one after the other.
        """
        ticket = int(torch.randint(NUM_TICKETS, ()))
        is_repeated = ticket in self._before
        states = self._before[ticket] if is_repeated else {index: self._now[index] for index in indices}
        self._before[ticket] = dict(states)
        call = Call(dict(states), device)
        with keep_generators(device):
            yield call
        # A recomputation draws old numbers again and must not move the streams on.
        if not is_repeated:
            self._now |= call.states


class Call:
    """The streams within one call of a layer."""

    def __init__(self, states: dict[int, State], device: torch.device) -> None:
        self.states, self._device = states, device

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Draw from the stream of the adapter at `index` inside the block."""
        set_state(self.states[index], self._device)
        yield
        self.states[index] = state_of(self._device)


def state_of(device: torch.device) -> State:
    is_cuda = device.type == "cuda"
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if is_cuda else []))


def set_state(state: State, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def keep_generators(device: torch.device) -> Iterator[None]:
    """Restore the default generators to their current states after the block."""
    state = state_of(device)
    try:
        yield
    finally:
        set_state(state, device)
