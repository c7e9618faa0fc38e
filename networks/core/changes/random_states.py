"""torch's default generators as several runs would have them, each for itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

NUM_TICKETS = 2**62

State = tuple[Tensor, ...]
"""State of the generator on the CPU, and of the device's where that has one."""


class Streams:
    """One stream for each adapter of a sweep: what an adapter draws does not depend on those beside it.

    A block that is computed again in the backward pass draws what it drew before: torch puts its default generator back
    to where it was, so the ticket that a call draws from it comes again, and with it the streams as they were.
    """

    def __init__(self) -> None:
        self._now: dict[int, State] = {}
        self._before: dict[int, dict[int, State]] = {}  # by ticket, how the streams stood

    def start(self, seeds: Mapping[int, int], device: torch.device) -> None:
        """Begin the streams of a batch; the default generators are left where they are."""
        self._before.clear()
        with kept(device):
            for place, seed in seeds.items():
                torch.manual_seed(seed)
                self._now[place] = state_of(device)

    @contextmanager
    def call(self, places: Sequence[int], device: torch.device) -> Iterator["Call"]:
        """Enter one call of a layer, in which the adapters at `places` draw in turn."""
        ticket = int(torch.randint(NUM_TICKETS, ()))
        is_repeated = ticket in self._before
        states = self._before[ticket] if is_repeated else {place: self._now[place] for place in places}
        self._before[ticket] = dict(states)
        call = Call(dict(states), device)
        with kept(device):
            yield call
        if not is_repeated:
            self._now |= call.states


class Call:
    """The streams within one call of a layer."""

    def __init__(self, states: dict[int, State], device: torch.device) -> None:
        self.states, self._device = states, device

    @contextmanager
    def of(self, place: int) -> Iterator[None]:
        """Draw in the block from the stream of that adapter."""
        set_state(self.states[place], self._device)
        yield
        self.states[place] = state_of(self._device)


def state_of(device: torch.device) -> State:
    on_card = device.type == "cuda"
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_card else []))


def set_state(state: State, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Restore the default generators afterwards."""
    state = state_of(device)
    try:
        yield
    finally:
        set_state(state, device)
