"""Captions to conditioning, each frozen caption encoded once."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch

from library.data.caching.text_files import Row, stack_rows
from library.types import Conditioning

MEMO_BYTES = 1 << 30


class CaptionMemo:
    """Remembers what frozen text encoders made of a caption; the longest unused are forgotten beyond `limit_bytes`.

    Every caption is encoded by itself: the result then depends on the caption alone and not on its neighbours in the
    batch, so a run that was interrupted, and starts with an empty memo, goes on with the same numbers.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Conditioning],
        padding: Mapping[str, float] | None = None,
        limit_bytes: int = MEMO_BYTES,
    ) -> None:
        """`padding` fills up features whose length differs between captions; see `TextCacheSpec`."""
        self._encode = encode
        self._padding = padding or {}
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of a batch, first axis as long as `captions`; without gradient."""
        return stack_rows([self._row(caption) for caption in captions], self._padding)

    def _row(self, caption: str) -> Row:
        row = self._rows.get(caption)
        if row is None:
            with torch.no_grad():
                row = {name: tensor[0] for name, tensor in self._encode([caption]).items()}
            self._rows[caption] = row
            self._bytes += sum(tensor.nbytes for tensor in row.values())
            while self._bytes > self._limit_bytes and len(self._rows) > 1:
                _, oldest = self._rows.popitem(last=False)
                self._bytes -= sum(tensor.nbytes for tensor in oldest.values())
        self._rows.move_to_end(caption)
        return row
