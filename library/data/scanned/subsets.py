"""The scan results of a subset and a dataset."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from library.data.description.buckets import Size
from library.data.description.schema import DatasetConfig, SubsetConfig
from library.data.scanned.columns import Sizes, Texts
from library.data.scanned.images import References, ScannedImages


@dataclass(frozen=True)
class ScannedSubset:
    """The scan result of a subset."""

    config: SubsetConfig
    images: ScannedImages
    dropped: tuple[tuple[str, str], ...] = ()  # (key, reason)
    without_caption: Sequence[str] = ()  # keys of images
    empty_caption: Sequence[str] = ()
    small: Sequence[str] = ()  # skipped by skip_image_resolution
    aside: Sequence[str] = ()  # names of image or caption files in image_dir that are not read
    alone: Sequence[str] = ()  # names of caption files in image_dir without an image
    surplus: Sequence[str] = ()  # paths of reference images that belong to no image


@dataclass(frozen=True)
class ScannedDataset:
    """The scan result of a dataset."""

    config: DatasetConfig
    subsets: tuple[ScannedSubset, ...]


@dataclass
class Listing:
    """The images of a subset during listing, in columns, because creating an object for each takes long."""

    config: SubsetConfig
    names: list[str] = field(default_factory=list)
    captions: Texts = field(default_factory=Texts.of)
    sizes: Sequence[Size | str] = ()  # or the reason if an image cannot be read
    masks: list[str] | None = None
    tags: list[str] | None = None
    references: list[list[tuple[str, Size]]] | None = None  # (path, size) of each image's references
    dropped: list[tuple[str, str]] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    empty_caption: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """The common start of the images' paths."""
        return "" if self.config.style == "metadata" else os.path.join(self.config.image_dir or "", "")

    @property
    def paths(self) -> list[str]:
        return [self.prefix + name for name in self.names]

    def to_subset(self) -> ScannedSubset:
        """Return the scan result. Images without a size are moved to `dropped`."""
        masks, tags = (None if texts is None else Texts.of(texts) for texts in (self.masks, self.tags))
        if isinstance(self.sizes, Sizes):  # from an index, in which all images have a size
            sizes, dropped = self.sizes, []
        else:
            sizes = Sizes.of([(0, 0) if isinstance(size, str) else size for size in self.sizes])
            named_sizes = zip(self.names, self.sizes, strict=True)
            dropped = [(self.prefix + name, reason) for name, reason in named_sizes if isinstance(reason, str)]
        references = None if self.references is None else References.of(self.references)
        images = ScannedImages(
            Texts.of(self.names), self.captions, sizes.array_N2, self.prefix, masks, tags, references=references
        )
        if dropped:
            images = images.take(np.flatnonzero(sizes.array_N2.any(axis=1)))
        return ScannedSubset(
            self.config,
            images,
            (*self.dropped, *dropped),
            tuple(self.without_caption),
            tuple(self.empty_caption),
            aside=tuple(self.aside),
            alone=tuple(self.alone),
            surplus=tuple(self.surplus),
        )
