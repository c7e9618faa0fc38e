"""Text conditioning from captions; each caption is encoded once by frozen text encoders."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch

from library.data.caching.text_files import Row, stack_rows
from library.types import Conditioning

MEMO_BYTES = 1 << 30


class CaptionMemo:
    """A least-recently-used cache of what frozen text encoders return, up to `limit_bytes`.

    Captions are encoded one at a time, so that a result depends on the caption alone and not on its neighbours in the
    batch. A resumed run starts with an empty cache and therefore computes the same numbers.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Conditioning],
        padding: Mapping[str, float] | None = None,
        limit_bytes: int = MEMO_BYTES,
    ) -> None:
        """`padding` holds the values that pad features of different lengths; see `TextCacheSpec`."""
        self._encode = encode
        self._padding = padding or {}
        self._limit_bytes = limit_bytes
        self.num_bytes = 0  # of the features that are kept
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Return the conditioning of a batch without gradient; the first axis is as long as `captions`."""
        return stack_rows([self._row(caption) for caption in captions], self._padding)

    def _row(self, caption: str) -> Row:
        row = self._rows.get(caption)
        if row is None:
            with torch.no_grad():
                row = {name: tensor[0] for name, tensor in self._encode([caption]).items()}
            self._rows[caption] = row
            self.num_bytes += sum(tensor.nbytes for tensor in row.values())
            # The caption just added stays, even if it alone is larger than the limit.
            while self.num_bytes > self._limit_bytes and len(self._rows) > 1:
                _, oldest = self._rows.popitem(last=False)
                self.num_bytes -= sum(tensor.nbytes for tensor in oldest.values())
        self._rows.move_to_end(caption)
        return row
