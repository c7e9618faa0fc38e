"""Several networks on the layers of one model: each acts on its own rows, and the model itself runs once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from networks.core.changes.adapter import Adapter, take_forward
from networks.core.changes.change import Forward, Stackable
from networks.core.changes.random_states import Streams
from networks.core.changes.stacked import can_be_stacked, run_stacked


class AdapterMultiplexer:
    """A switch that selects which networks act, by their index in the given list.

    A layer raises RuntimeError if it runs outside of `only` and `together`.
    """

    def __init__(self, networks: Sequence[Sequence[Adapter]], draws: Sequence[bool]) -> None:
        """Take the forward of every layer that one of the networks, given by their adapters, adapts; none is installed.

        `draws` has True for networks that leave something out at random, or add noise, in training.
        """
        self.acting: tuple[int, ...] = ()
        self.streams = Streams()
        self.device = torch.device("cpu")
        self.has_streams = False
        layers: dict[nn.Module, dict[int, Adapter]] = {}
        for place, network in enumerate(networks):
            for adapter in network:
                layers.setdefault(adapter.target.module, {})[place] = adapter
        self.draws = tuple(draws)
        self.layers = [SharedLayer(layer, adapters, self) for layer, adapters in layers.items()]

    @contextmanager
    def only(self, place: int) -> Iterator[None]:
        """Run the model with one network inside the block. The numbers are those that it computes alone."""
        with self._acting((place,)):
            yield

    @contextmanager
    def together(self, seeds: Mapping[int, int], device: torch.device, draws: bool = True) -> Iterator[None]:
        """Run several networks inside the block, each on its own part of the rows.

        The first axis of every layer's input consists of equal parts, one for each key of `seeds`, in this order. The
        keys are indices of networks, the values seeds of their random streams. Without `draws`, which is for runs that
        do not depend on random numbers, all networks share one stream.
        """
        self.device, self.has_streams = device, draws and any(self.draws[place] for place in seeds)
        if self.has_streams:
            self.streams.start(seeds, device)
        with self._acting(tuple(seeds)):
            yield

    @contextmanager
    def _acting(self, places: tuple[int, ...]) -> Iterator[None]:
        before, self.acting = self.acting, places
        try:
            yield
        finally:
            self.acting = before

    def share_stacked(self, places: Sequence[int]) -> float:
        """Return the share of layers that compute the adapters of these networks in one product."""
        return sum(layer.stack_changes(tuple(places)) is not None for layer in self.layers) / len(self.layers)


class SharedLayer:
    """One layer of the base model with the adapters that several networks have for it."""

    def __init__(self, layer: nn.Module, adapters: Mapping[int, Adapter], turns: AdapterMultiplexer) -> None:
        self._adapters, self._turns = adapters, turns
        self._stacked: dict[tuple[int, ...], Sequence[Stackable] | None] = {}
        self._base: Forward = take_forward(layer, self.forward)

    def stack_changes(self, places: tuple[int, ...]) -> Sequence[Stackable] | None:
        """Return the changes of these networks if one product can compute all of them, else None."""
        if places not in self._stacked:
            found = [self._adapters[place].change for place in places if place in self._adapters]
            draws = any(self._turns.draws[place] for place in places)
            is_possible = len(found) == len(places) and not draws and can_be_stacked(found)
            self._stacked[places] = found if is_possible else None  # type: ignore[assignment]
        return self._stacked[places]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, where each part of the rows has the change of its network."""
        places = self._turns.acting
        if len(places) == 1:
            return self._part(places[0], x, self._base)
        if not places:
            raise RuntimeError("a layer that several adapters share runs, but nobody has said which of them act")
        if len(x) % len(places):
            raise RuntimeError(f"a layer runs {len(x)} rows, which are not those of {len(places)} adapters")
        strengths = [self._strength(place) for place in places]
        if not any(strengths):
            return self._base(x)
        if (changes := self.stack_changes(places)) is not None:
            return run_stacked(changes, x, self._base, strengths)
        return self._one_by_one(places, x)

    def _one_by_one(self, places: Sequence[int], x: Tensor) -> Tensor:
        """Run the parts one after the other. The layer itself runs once for all changes that only add to its output."""
        count = len(places)
        out = self._base(x) if any(self._adds(place) for place in places) else None
        outs = [None] * count if out is None else list(out.chunk(count))
        draws = any(self._turns.draws[place] for place in places if place in self._adapters)
        has_streams = draws and self._turns.has_streams
        streams = self._turns.streams.call(places, self._turns.device) if has_streams else nullcontext()
        parts = []
        with streams as call:
            for place, part, done in zip(places, x.chunk(count), outs, strict=True):
                base = self._base if done is None or not self._adds(place) else given(done)
                with nullcontext() if call is None else call.of(place):
                    parts.append(self._part(place, part, base))
        return torch.cat(parts)

    def _part(self, place: int, x: Tensor, base: Forward) -> Tensor:
        """Return the output of one network for its rows."""
        adapter = self._adapters.get(place)
        if adapter is None or adapter.multiplier == 0:
            return base(x)
        return adapter.change.forward(x, base, adapter.multiplier)

    def _strength(self, place: int) -> float:
        return self._adapters[place].multiplier if place in self._adapters else 0.0

    def _adds(self, place: int) -> bool:
        """Return True if a network leaves the layer's input unchanged and only adds to its output, or does nothing."""
        adapter = self._adapters.get(place)
        return adapter is None or adapter.change.adds_to_output


def given(out: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces a layer which has already run: it ignores its input and returns `out`."""
    return lambda x: out
