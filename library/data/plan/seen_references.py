"""Reference images for text encoders that see them with the caption."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from library.base.errors import of_file
from library.data.decoding.images import Pixels, Placement, apply_placement, crop_at_centre, read_pixels, with_alpha
from library.data.decoding.tensors import to_pixels
from library.data.decoding.threads import read_many
from library.data.description.buckets import Shape
from library.data.description.schema import SubsetConfig
from library.data.plan.reference_digests import digest_files
from library.data.plan.samples import Sample, Samples, check_size
from library.data.scanned.images import ScannedImage
from library.data.sources.storage.index_places import IndexPlaces
from library.data.sources.storage.storage import Storage, is_remote
from library.types import CaptionWithImages

Reader = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class SeenReferences:
    """The reference images as text encoders see them, with a digest of content, size and crop for each sample."""

    digests_N: NDArray[np.uint64]  # 0 without references
    storage: Storage
    has_alpha: bool  # images are RGBA
    are_measured_mirrored: bool = False  # mirrored references are needed without flip_aug

    @classmethod
    def of(
        cls, samples: Samples, subsets: Sequence[SubsetConfig], storage: Storage, has_alpha: bool, num_threads: int
    ) -> "SeenReferences":
        """Compute the digests of all samples that are drawn. Raises UserError for subsets that change reference
        images in every draw."""
        sample_by_number = {
            number: sample
            for number, sample in enumerate(samples)
            # A partner of opposite_dir is trained like an image: its text encoder sees the caption alone.
            if sample.image.references and sample.num_draws and not subsets[sample.subset].opposite_dir
        }
        for config in [subsets[row] for row in dict.fromkeys(sample.subset for sample in sample_by_number.values())]:
            for name in [*config.changing, *(["face_crop_aug_range"] if config.face_crop_aug_range else [])]:
                raise of_file(config.source)(
                    f": {name} changes reference images in every draw, but the text encoder, whose outputs are "
                    "cached, sees them too",
                    "remove it",
                )
        contents = digest_contents(sample_by_number.values(), subsets, storage, num_threads)
        digests_N = np.zeros(len(samples), dtype=np.uint64)
        for number, sample in sample_by_number.items():
            records = [
                (contents[one], shape)
                for one, shape in zip(sample.image.references, sample.shape.references, strict=True)
            ]
            digests_N[number] = digest_references(records, subsets[sample.subset].resize_interpolation)
        return cls(digests_N, storage, has_alpha)

    def digest(self, number: int) -> int:
        """Return the `digest_references` of a sample; 0 without references."""
        return int(self.digests_N[number])

    def key(self, number: int, caption: str, is_flipped: bool) -> str:
        """Return the text under which the features of a caption of this sample are cached."""
        return str(self.seen(number, caption, is_flipped, lambda: ())) if self.digests_N[number] else caption

    def texts(
        self, number: int, sample: Sample, captions: Sequence[str], config: SubsetConfig, also: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Return the texts to encode for this sample: its captions, those in `also`, and the empty one if caption
        dropout is on, with its references; also with mirrored references if they are needed."""
        if not self.digests_N[number]:
            return tuple(captions)
        rules = config.captions
        drops = rules.caption_dropout_rate > 0 or rules.caption_dropout_every_n_epochs > 0
        return tuple(
            self.seen(number, caption, is_flipped, partial(self.read, sample, config.resize_interpolation, is_flipped))
            for is_flipped in ((False, True) if config.flip_aug or self.are_measured_mirrored else (False,))
            for caption in dict.fromkeys((*captions, *also, *([""] if drops else [])))
        )

    def seen(self, number: int, caption: str, is_flipped: bool, read: Reader) -> CaptionWithImages:
        return CaptionWithImages(caption, f"{self.digests_N[number]:016x}{'-' if is_flipped else ''}", read)

    def read(self, sample: Sample, interpolation: str | None, is_flipped: bool) -> tuple[Tensor, ...]:
        """Read the references of a sample as they are trained: CHW, -1..1."""
        placement = crop_at_centre(sample.shape, is_flipped)
        return tuple(
            map(to_pixels, read_placed_references(sample, placement, interpolation, self.storage, self.has_alpha))
        )


def digest_contents(
    samples: Iterable[Sample], subsets: Sequence[SubsetConfig], storage: Storage, num_threads: int
) -> dict[ScannedImage, str]:
    """Return the digest of the content of each reference of these samples."""
    packed: dict[ScannedImage, None] = {}
    files: dict[IndexPlaces, dict[ScannedImage, None]] = defaultdict(dict)
    for sample in samples:
        for reference in sample.image.references:
            # In rows that differ in their captions alone, references repeat.
            is_file = reference.location is None
            (files[storage.index_places(subsets[sample.subset])] if is_file else packed)[reference] = None
    digests = read_many(partial(digest_packed, storage=storage), list(packed), num_threads, "reading references")
    contents = dict(zip(packed, digests, strict=True))
    for places, references in files.items():
        by_path = digest_files([reference.key for reference in references], places, num_threads)
        contents |= {reference: by_path[reference.key] for reference in references}
    return contents


def digest_packed(reference: ScannedImage, storage: Storage) -> str:
    """Return the digest of a reference in a larger file; for an image at a URL that of its ends, as in the index."""
    assert reference.location is not None
    if is_remote(reference.location.file):
        return reference.location.digest
    return blake2b(storage.read(reference.location), digest_size=16).hexdigest()


def digest_references(references: Sequence[tuple[str, Shape]], interpolation: str | None) -> int:
    """Return a digest of the references of a sample, given the digest of the content and the shape of each; never 0."""
    records = [(content, shape.bucket, shape.resized) for content, shape in references]
    # 0 stands for a sample without references.
    return max(1, int.from_bytes(blake2b(f"{records} {interpolation}".encode(), digest_size=8).digest(), "big"))


def read_placed_references(
    sample: Sample,
    placement: Placement,
    interpolation: str | None,
    storage: Storage,
    has_alpha: bool,
    are_opaque: bool = False,
) -> list[Pixels]:
    """Read and place the references of a sample; RGBA with `has_alpha`, opaque with `are_opaque`.

    A reference with the size and shape of its image is cropped like the image, others at the centre. All are mirrored
    like the image.
    """
    # The shape of a reference has no references itself, so the image's are left out of the comparison.
    image_shape, placed_references = replace(sample.shape, references=()), []
    for reference, shape in zip(sample.image.references, sample.shape.references, strict=True):
        rgb, alpha = read_pixels(reference.key, storage.content(reference))
        check_size(reference, rgb)
        is_alike = shape == image_shape and reference.size == sample.image.size
        reference_placement = placement if is_alike else crop_at_centre(shape, placement.is_flipped)
        pixels = with_alpha(rgb, None if are_opaque else alpha) if has_alpha else rgb
        placed_references.append(apply_placement(pixels, reference_placement, interpolation))
    return placed_references
