"""Where the stored parts of frozen layers lie among flat bytes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.codecs.codec import Parts
from library.memory.frozen import FrozenLayer

ALIGNMENT = 256  # bytes: where parts begin, as the card's own allocations do


@dataclass(frozen=True)
class Span:
    """Where one part of one layer lies among the bytes of its block."""

    layer: FrozenLayer
    name: str
    part: Tensor  # on the meta device: shape, layout and dtype
    start: int
    end: int

    def within(self, bytes_N: Tensor) -> Tensor:
        """The part as a view of the bytes."""
        return bytes_N[self.start : self.end].view(self.part.dtype).as_strided(self.part.shape, self.part.stride())


def spans(layers: Iterable[FrozenLayer]) -> Iterator[Span]:
    """The parts of frozen layers, one after the other."""
    start = 0
    for layer in layers:
        for name, part in layer.own_parts().items():
            # Convolutions compute with their channels last, see library.memory.devices.place.
            wanted = part.to("meta", memory_format=torch.channels_last if part.ndim == 4 else torch.contiguous_format)
            end = start + part.numel() * part.element_size()
            yield Span(layer, name, wanted, start, end)
            start = -(-end // ALIGNMENT) * ALIGNMENT


def parts_in(layout: Sequence[Span], bytes_N: Tensor) -> Parts:
    """The parts as views of the bytes."""
    return {span.name: span.within(bytes_N) for span in layout}
