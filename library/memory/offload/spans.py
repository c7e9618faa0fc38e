"""Layout of the stored parts of frozen layers in a flat byte tensor."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.codecs.codec import Parts
from library.memory.frozen import FrozenLayer

ALIGNMENT = 256  # bytes, as for the GPU's own allocations


@dataclass(frozen=True)
class Span:
    """Location of one part of one layer in the bytes of its block."""

    layer: FrozenLayer
    name: str
    part: Tensor  # on the meta device: shape, layout and dtype
    start: int
    end: int

    def within(self, bytes_N: Tensor) -> Tensor:
        """Return the part as a view of the bytes."""
        return bytes_N[self.start : self.end].view(self.part.dtype).as_strided(self.part.shape, self.part.stride())


def spans(layers: Iterable[FrozenLayer]) -> Iterator[Span]:
    """Lay out the parts of frozen layers one after the other, each at a multiple of ALIGNMENT."""
    start = 0
    for layer in layers:
        for name, part in layer.own_parts().items():
            # Convolutions compute with channels last, see library.memory.devices.move_to_device.
            meta_part = part.to(
                "meta", memory_format=torch.channels_last if part.ndim == 4 else torch.contiguous_format
            )
            end = start + part.numel() * part.element_size()
            yield Span(layer, name, meta_part, start, end)
            start = -(-end // ALIGNMENT) * ALIGNMENT


def parts_in(layout: Sequence[Span], bytes_N: Tensor) -> Parts:
    """Return the parts as views of the bytes."""
    return {span.name: span.within(bytes_N) for span in layout}
