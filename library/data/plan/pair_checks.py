"""Checks of pairs (`opposite_dir`): they are trained where there are some, and teach something."""

import os

from library.base.errors import about, list_few, of_file
from library.base.formatting import format_count
from library.data.decoding.threads import read_many
from library.data.description.schema import RunDataConfig
from library.data.plan.dataset_digest import content_digest, whole_digest
from library.data.scanned.images import ScannedImage, ScannedImages

NUM_THREADS = 16


def check_pairs(config: RunDataConfig, are_trained: bool) -> None:
    """Raise UserError if the dataset has pairs but they are not trained (`are_trained`), or the reverse."""
    for subset in (subset for dataset in config.datasets for subset in dataset.subsets):
        if are_trained and not subset.opposite_dir and not subset.is_forgetting_probe:
            raise of_file(subset.source)(
                "has no pairs, which --preference_loss and --pair_slider train: set opposite_dir in "
                "this subset of --dataset_config, or remove it"
            )
        if subset.opposite_dir and not are_trained:
            raise of_file(subset.source)(
                "has opposite_dir, whose pairs are trained with --preference_loss dpo or --pair_slider 1",
                "add one of them, or remove opposite_dir",
            )


def check_differences(opposite_dir: str, images: ScannedImages) -> None:
    """Raise UserError for pairs of equal files, from which nothing can be learned."""
    are_same = read_many(lambda image: is_same_file(image, image.references[0]), list(images), NUM_THREADS)
    if same := [image.key for image, is_same in zip(images, are_same, strict=True) if is_same]:
        raise about("opposite_dir")(
            f"{opposite_dir}: {format_count(len(same), 'image')} equal to the partner, which teaches nothing: "
            f"{list_few(same)}",
            "replace or remove them",
        )


def is_same_file(image: ScannedImage, reference: ScannedImage) -> bool:
    """Return True if both files have the same content, in larger files the same ends."""
    if image.location is not None and reference.location is not None:
        return image.location.digest == reference.location.digest
    if image.size != reference.size or os.path.getsize(image.key) != os.path.getsize(reference.key):
        return False
    # Most copies that were edited differ in the parts of the short digest, and need not be read whole.
    is_alike = content_digest(image.key) == content_digest(reference.key)
    return is_alike and whole_digest(image.key) == whole_digest(reference.key)
