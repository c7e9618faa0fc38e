"""Columns of many texts and sizes without an object for each."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from library.data.description.buckets import Size

BLOCK = 16384  # texts converted to objects at a time
ERRORS = "surrogatepass"  # file names may contain bytes that are not valid text


Item = TypeVar("Item")


class Column(Sequence[Item]):
    """A sequence whose items are created on access by `item`. A slice is a list of items."""

    @abstractmethod
    def item(self, index: int) -> Item:
        """Create the item at an index from 0."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.item(index % len(self))


@dataclass(frozen=True, eq=False)
class Texts(Column[str]):
    """A column of N texts. Text i is `content[ends[i - 1]:ends[i]]` in UTF-8; iteration decodes a block at a time."""

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Iterable[str] = ()) -> "Texts":
        """Build a column from texts."""
        remaining, parts, lengths = iter(texts), [], []
        while block := list(islice(remaining, BLOCK)):
            joined = "".join(block)
            part = joined.encode(errors=ERRORS)
            # In ASCII a text has as many bytes as characters, which is faster to count.
            is_ascii = len(part) == len(joined)
            sizes = map(len, block) if is_ascii else (len(text.encode(errors=ERRORS)) for text in block)
            lengths.append(np.fromiter(sizes, dtype=np.int64, count=len(block)))
            parts.append(np.frombuffer(part, dtype=np.uint8))
        return cls(join_columns(parts, np.uint8), np.cumsum(join_columns(lengths, np.int64)))

    def __len__(self) -> int:
        return len(self.ends)

    def contain(self, text: str) -> bool:
        """Return True if a text has the other one in it, or several do that follow each other."""
        return text.encode(errors=ERRORS) in self.content.tobytes()

    def item(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.content[start : self.ends[index]].tobytes().decode(errors=ERRORS)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), BLOCK):
            ends = self.ends[first : first + BLOCK]
            part = self.content[start : ends[-1]].tobytes()
            edges = [0, *(ends - start).tolist()]
            start = int(ends[-1])
            # In ASCII the edges in bytes are those in characters, so a block is decoded once and cut as text.
            text = part.decode(errors=ERRORS)
            if len(text) == len(part):
                yield from [text[a:b] for a, b in pairwise(edges)]
            else:
                yield from [part[a:b].decode(errors=ERRORS) for a, b in pairwise(edges)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Texts):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.content, other.content)

    __hash__ = None  # type: ignore[assignment]

    @property
    def has_lines(self) -> bool:
        """True if any text has more than one line."""
        # In UTF-8 the byte of a newline occurs in no other character.
        return bool((self.content == ord("\n")).any())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of bytes of each text."""
        return np.diff(self.ends, prepend=0)

    def lowered(self) -> "Texts":
        content = self.content.tobytes()
        # The lower case of other letters may have another number of bytes.
        if content.isascii():
            return Texts(np.frombuffer(content.lower(), dtype=np.uint8), self.ends)
        return Texts.of(map(str.lower, self))

    def take(self, rows: NDArray[Any]) -> "Texts":
        """Return the texts at these indices, in their order."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        content = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        starts = self.ends[rows] - lengths
        # By blocks, because the indices take eight bytes for each byte of text.
        for first in range(0, len(ends), BLOCK):
            block = slice(first, first + BLOCK)
            low = int(ends[first] - lengths[first])
            high = int(ends[block][-1])
            offsets = starts[block] - (ends[block] - lengths[block])
            content[low:high] = self.content[np.arange(low, high) + np.repeat(offsets, lengths[block])]
        return Texts(content, ends)


@dataclass(frozen=True, eq=False)
class Sizes(Column[Size]):
    """A column of N sizes (width, height)."""

    array_N2: NDArray[np.int32]

    @classmethod
    def of(cls, sizes: Sequence[Size]) -> "Sizes":
        """Build a column from sizes."""
        return cls(np.array(sizes, dtype=np.int32).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.array_N2)

    def item(self, index: int) -> Size:
        width, height = self.array_N2[index].tolist()
        return width, height

    def __iter__(self) -> Iterator[Size]:
        return map(tuple, self.array_N2.tolist())


def join_columns(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    """Concatenate columns; an empty column if there are none."""
    return np.concatenate([np.empty(0, dtype=dtype), *parts])
