"""Thumbnails of images with their reference images, for the report."""

from collections.abc import Iterator
from itertools import islice

from PIL import Image

from library.base.errors import UserError
from library.data.decoding.images import Pixels, apply_placement, crop_at_centre, read_pixels
from library.data.plan.data_plan import DataPlan
from library.data.plan.samples import Sample
from library.training.evaluation.prompt_images import show_beside
from library.training.reporting.events import FoundImage
from library.training.reporting.sample_images import THUMBNAIL_SIDE, encode_data_url

MOST_SHOWN = 12  # pairs


def show_pairs(plan: DataPlan | None) -> list[FoundImage]:
    """Return the first images that have references, as trained, with the references on the left."""
    return [] if plan is None else list(islice(iterate_pairs(plan), MOST_SHOWN))


def iterate_pairs(plan: DataPlan) -> Iterator[FoundImage]:
    """Yield images with references that can be decoded; subsets without references are not read."""
    start = 0
    for images in plan.samples.subsets:
        indices = range(start, start + len(images))
        start += len(images)
        for index in indices if images.references is not None else ():
            sample = plan.samples[index]
            if not sample.image.references:
                continue
            try:
                image, *references = [Image.fromarray(pixels) for pixels in place_images(sample, plan)]
            except UserError:
                continue
            row = show_beside(references, image)
            num_images = 1 + len(references)
            thumbnail = encode_data_url(row, num_images * THUMBNAIL_SIDE, THUMBNAIL_SIDE)
            yield FoundImage(sample.image.key, sample.image.caption, thumbnail)


def place_images(sample: Sample, plan: DataPlan) -> Iterator[Pixels]:
    """Yield an image and its references, resized and cropped."""
    images, shapes = (sample.image, *sample.image.references), (sample.shape, *sample.shape.references)
    for image, shape in zip(images, shapes, strict=True):
        yield apply_placement(read_pixels(image.key, plan.storage.content(image))[0], crop_at_centre(shape), None)
