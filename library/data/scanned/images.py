"""The listed images of a subset, before any is opened. Stored in columns: a million images take 200 MB."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import repeat
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from library.data.description.buckets import Size
from library.data.scanned.columns import Column, Texts

END_BYTES = 4096

T = TypeVar("T")


class FileStamp(NamedTuple):
    """Values that change when a file is replaced."""

    num_bytes: int
    mark: str


class Version(NamedTuple):
    """Values that change when an image is replaced."""

    num_bytes: int
    stamp: int  # modification time of a file in ns; for part of a larger file, bits of its digest


def digest_of_ends(ends: bytes, num_bytes: int) -> str:
    """Return a digest of a file's size and its first and last `END_BYTES`. Only copies are expected to share it."""
    return blake2b(ends + num_bytes.to_bytes(8, "big"), digest_size=16).hexdigest()


def digest_content(content: bytes) -> str:
    """Return the `digest_of_ends` of a whole file's content."""
    return digest_of_ends(content[:END_BYTES] + content[max(0, len(content) - END_BYTES) :], len(content))


class OpenFiles(Protocol):
    """Protocol of the files that a process opens for readers; `Storage` implements it."""

    def file(self, file: str) -> io.RawIOBase:
        """Open a path or a URL."""
        ...

    def kept_open(self, file: str, open_file: Callable[[], T]) -> T:
        """Return what `open_file` returned for this file earlier; call it if there is nothing."""
        ...

    def shared(self, kind: type[T]) -> T:
        """Return the instance of a class that all readers of this process share."""
        ...


class Reader(Protocol):
    """Protocol of a reader of images that are not a plain byte range of their file. Workers get a pickled copy."""

    @property
    def name(self) -> str:
        """A part of names in the disk cache, which distinguishes equal locations of different readers."""
        ...

    def read(self, files: OpenFiles, location: "ImageLocation") -> bytes:
        """Return the bytes of one image. Raises UserError for a file that was replaced or cannot be read."""
        ...

    def read_group(self, files: OpenFiles, location: "ImageLocation") -> Iterator[tuple[int, bytes]]:
        """Yield (start, bytes) of the image and all others that must be read with it."""
        ...


class ImageLocation(NamedTuple):
    """The location of an image in a larger file: a byte range of a tar file, or a row of a Parquet file."""

    file: str  # a path or a URL
    name: str  # of the image in the file
    start: int  # byte, or another number that the reader knows, such as a row
    num_bytes: int
    digest: str  # hexadecimal `digest_of_ends` of the image; shared by copies
    reader: Reader | None = None  # None: the image is this byte range of the file


class ScannedImage(NamedTuple):
    """An image of a subset. A tuple, because creating one takes a third of the time of a dataclass."""

    key: str  # identifies it in messages and for random draws; the path, if it is a file
    caption: str  # as read, before prefix, suffix and tag rules
    size: Size  # width, height, upright
    mask_path: str | None = None
    tags: str | None = None  # the tags field of a metadata file, for statistics
    location: ImageLocation | None = None  # None: the image is the file `key`
    references: tuple["ScannedImage", ...] = ()  # in the order of the edit model's inputs
    cache_directory: str | None = None  # of its subset


@dataclass(frozen=True, eq=False)
class ImageLocations:
    files: tuple[str, ...]  # paths and URLs to open
    labels: tuple[str, ...]  # prefixes of keys, without secrets; "" for images at URLs
    file_N: NDArray[np.int32]
    start_N: NDArray[np.int64]
    bytes_N: NDArray[np.int64]
    digest_N16: NDArray[np.uint8]
    reader: Reader | None = None
    urls: Texts | None = None  # URLs of images that are separate files

    def of(self, number: int, name: str) -> ImageLocation:
        file = self.files[self.file_N[number]] if self.urls is None else self.urls[number]
        start, num_bytes = int(self.start_N[number]), int(self.bytes_N[number])
        return ImageLocation(file, name, start, num_bytes, self.digest_N16[number].tobytes().hex(), self.reader)

    @property
    def prefixes(self) -> list[str]:
        """The prefix of keys for the images of each file."""
        return [f"{file}/" if file else "" for file in self.labels]

    def take(self, rows: NDArray[Any]) -> "ImageLocations":
        return replace(
            self,
            file_N=self.file_N[rows],
            start_N=self.start_N[rows],
            bytes_N=self.bytes_N[rows],
            digest_N16=self.digest_N16[rows],
            urls=None if self.urls is None else self.urls.take(rows),
        )


@dataclass(frozen=True, eq=False)
class References:
    """The reference images of N images, at most R of each. Missing ones are "" with size 0."""

    paths: tuple[Texts, ...]
    sizes_NR2: NDArray[np.int32]
    locations: tuple[ImageLocations, ...] | None = None  # None: each reference is a file

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[str, Size]]]) -> "References":
        """Build the columns from (path, size) of each image's references."""
        count = max(map(len, rows), default=0)
        filled = [[*row, *[("", (0, 0))] * (count - len(row))] for row in rows]
        sizes_NR2 = np.array([[size for _, size in row] for row in filled], dtype=np.int32)
        paths = tuple(Texts.of(row[r][0] for row in filled) for r in range(count))
        return cls(paths, sizes_NR2.reshape(len(rows), count, 2))

    def __iter__(self) -> Iterator[tuple[ScannedImage, ...]]:
        for n, (paths, sizes) in enumerate(
            zip(zip(*self.paths, strict=True), iterate_in_blocks(self.sizes_NR2), strict=True)
        ):
            yield tuple(
                ScannedImage(path, "", tuple(size), location=self.locations[r].of(n, path) if self.locations else None)
                for r, (path, size) in enumerate(zip(paths, sizes, strict=True))
                if path
            )

    def of_image(self, number: int) -> tuple[ScannedImage, ...]:
        return next(iter(self.take(np.array([number]))))

    def take(self, rows: NDArray[Any]) -> "References":
        locations = None if self.locations is None else tuple(column.take(rows) for column in self.locations)
        return References(tuple(paths.take(rows) for paths in self.paths), self.sizes_NR2[rows], locations)


@dataclass(frozen=True, eq=False)
class ScannedImages(Column[ScannedImage]):
    """The N images of a subset. Objects are created on access."""

    names: Texts  # keys without their prefix
    captions: Texts
    sizes_N2: NDArray[np.int32]
    prefix: str = ""
    masks: Texts | None = None
    tags: Texts | None = None
    locations: ImageLocations | None = None
    references: References | None = None
    cache_directory: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def item(self, index: int) -> ScannedImage:
        width, height = self.sizes_N2[index].tolist()
        name, locations = self.names[index], self.locations
        return ScannedImage(
            (self.prefix if locations is None else locations.prefixes[locations.file_N[index]]) + name,
            self.captions[index],
            (width, height),
            None if self.masks is None else self.masks[index],
            None if self.tags is None else self.tags[index],
            None if locations is None else locations.of(index, name),
            () if self.references is None else self.references.of_image(index),
            self.cache_directory,
        )

    def __iter__(self) -> Iterator[ScannedImage]:
        nothing: Iterator[None] = repeat(None)
        locations = nothing if self.locations is None else map(self.locations.of, range(len(self)), self.names)
        sizes = map(tuple, iterate_in_blocks(self.sizes_N2))
        masks, tags = self.masks or nothing, self.tags or nothing
        references: Any = self.references or repeat(())
        # Not strict, because repeat() never ends.
        columns = (self.each_key(), self.captions, sizes, masks, tags, locations, references)
        rows: Any = zip(*columns, repeat(self.cache_directory), strict=False)
        return map(ScannedImage._make, rows)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ScannedImages) and len(self) == len(other) and all(map(ScannedImage.__eq__, self, other))
        )

    __hash__ = None  # type: ignore[assignment]

    def each_key(self) -> Iterator[str]:
        if self.locations is None:
            return map(self.prefix.__add__, self.names) if self.prefix else iter(self.names)
        prefixes = map(self.locations.prefixes.__getitem__, iterate_in_blocks(self.locations.file_N))
        return map(str.__add__, prefixes, self.names)

    def local_folders(self) -> set[str]:
        """Return the folders of all images, or of the larger files that hold them; none for those at URLs."""
        files: Iterable[str] = self.each_key()
        if self.locations is not None:
            files = self.locations.files if self.locations.urls is None else self.locations.urls
        return {os.path.dirname(file) for file in files if "://" not in file}

    def keys_at(self, rows: NDArray[Any]) -> Sequence[str]:
        if self.locations is None and not self.prefix:
            return self.names.take(rows)
        return Texts.of(self.take(rows).each_key())

    def take(self, rows: NDArray[Any]) -> "ScannedImages":
        return replace(
            self,
            names=self.names.take(rows),
            captions=self.captions.take(rows),
            sizes_N2=self.sizes_N2[rows],
            masks=None if self.masks is None else self.masks.take(rows),
            tags=None if self.tags is None else self.tags.take(rows),
            locations=None if self.locations is None else self.locations.take(rows),
            references=None if self.references is None else self.references.take(rows),
        )


def iterate_in_blocks(column: NDArray[Any], block: int = 16384) -> Iterator[Any]:
    """Yield the values of a column as Python objects, converted a block at a time."""
    for first in range(0, len(column), block):
        yield from column[first : first + block].tolist()
