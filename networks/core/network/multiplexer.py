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

    def __init__(self, networks: Sequence[Sequence[Adapter]], are_random: Sequence[bool]) -> None:
        """Take the forward of every layer that one of the networks, given by their adapters, adapts; none is installed.

        `are_random` has True for networks that leave something out at random, or add noise, in training.
        """
        self.active: tuple[int, ...] = ()
        self.streams = Streams()
        self.device = torch.device("cpu")
        self.has_streams = False
        layers: dict[nn.Module, dict[int, Adapter]] = {}
        for index, network in enumerate(networks):
            for adapter in network:
                layers.setdefault(adapter.target.module, {})[index] = adapter
        self.are_random = tuple(are_random)
        self.layers = [SharedLayer(layer, adapters, self) for layer, adapters in layers.items()]

    @contextmanager
    def only(self, index: int) -> Iterator[None]:
        """Run the model with one network inside the block. The numbers are those that it computes alone."""
        with self._activate((index,)):
            yield

    @contextmanager
    def together(self, seeds: Mapping[int, int], device: torch.device, has_own_streams: bool = True) -> Iterator[None]:
        """Run several networks inside the block, each on its own part of the rows.

        The first axis of every layer's input consists of equal parts, one for each key of `seeds`, in this order. The
        keys are indices of networks, the values seeds of their random streams. Without `has_own_streams`, which is for
        runs that do not depend on random numbers, all networks share one stream.
        """
        self.device, self.has_streams = device, has_own_streams and any(self.are_random[index] for index in seeds)
        if self.has_streams:
            self.streams.start(seeds, device)
        with self._activate(tuple(seeds)):
            yield

    @contextmanager
    def _activate(self, indices: tuple[int, ...]) -> Iterator[None]:
        previous, self.active = self.active, indices
        try:
            yield
        finally:
            self.active = previous

    def share_stacked(self, indices: Sequence[int]) -> float:
        """Return the share of layers that compute the adapters of these networks in one product."""
        return sum(layer.stack_changes(tuple(indices)) is not None for layer in self.layers) / len(self.layers)


class SharedLayer:
    """One layer of the base model with the adapters that several networks have for it."""

    def __init__(self, layer: nn.Module, adapters: Mapping[int, Adapter], multiplexer: AdapterMultiplexer) -> None:
        self._adapters, self._multiplexer = adapters, multiplexer
        self._stacked: dict[tuple[int, ...], Sequence[Stackable] | None] = {}
        self._base: Forward = take_forward(layer, self.forward)

    def stack_changes(self, indices: tuple[int, ...]) -> Sequence[Stackable] | None:
        """Return the changes of these networks if one product can compute all of them, else None."""
        # The answer is kept, because checking protocols takes a noticeable part of a short step.
        if indices not in self._stacked:
            changes = [self._adapters[index].change for index in indices if index in self._adapters]
            is_random = any(self._multiplexer.are_random[index] for index in indices)
            # Networks that draw random numbers need streams of their own, so they run one by one.
            is_possible = len(changes) == len(indices) and not is_random and can_be_stacked(changes)
            self._stacked[indices] = changes if is_possible else None  # type: ignore[assignment]
        return self._stacked[indices]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, where each part of the rows has the change of its network."""
        indices = self._multiplexer.active
        if len(indices) == 1:
            return self._part(indices[0], x, self._base)
        if not indices:
            raise RuntimeError("a layer that several adapters share runs, but nobody has said which of them act")
        if len(x) % len(indices):
            raise RuntimeError(f"a layer runs {len(x)} rows, which are not those of {len(indices)} adapters")
        strengths = [self._strength(index) for index in indices]
        if not any(strengths):
            return self._base(x)
        if (changes := self.stack_changes(indices)) is not None:
            return run_stacked(changes, x, self._base, strengths)
        return self._one_by_one(indices, x)

    def _one_by_one(self, indices: Sequence[int], x: Tensor) -> Tensor:
        """Run the parts one after the other. The layer itself runs once for all changes that only add to its output."""
        count = len(indices)
        out = self._base(x) if any(self._adds(index) for index in indices) else None
        base_outs = [None] * count if out is None else list(out.chunk(count))
        is_random = any(self._multiplexer.are_random[index] for index in indices if index in self._adapters)
        has_streams = is_random and self._multiplexer.has_streams
        streams = self._multiplexer.streams.call(indices, self._multiplexer.device) if has_streams else nullcontext()
        parts = []
        with streams as call:
            for index, part, base_out in zip(indices, x.chunk(count), base_outs, strict=True):
                base = self._base if base_out is None or not self._adds(index) else return_always(base_out)
                with nullcontext() if call is None else call.of(index):
                    parts.append(self._part(index, part, base))
        return torch.cat(parts)

    def _part(self, index: int, x: Tensor, base: Forward) -> Tensor:
        """Return the output of one network for its rows."""
        adapter = self._adapters.get(index)
        if adapter is None or adapter.multiplier == 0:
            return base(x)
        return adapter.change.forward(x, base, adapter.multiplier)

    def _strength(self, index: int) -> float:
        return self._adapters[index].multiplier if index in self._adapters else 0.0

    def _adds(self, index: int) -> bool:
        """Return True if a network leaves the layer's input unchanged and only adds to its output, or does nothing."""
        adapter = self._adapters.get(index)
        return adapter is None or adapter.change.adds_to_output


def return_always(out: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces a layer which has already run: it ignores its input and returns `out`."""
    return lambda x: out
