"""Assignment of training sizes (buckets) to images. Sizes are (width, height) in pixels."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from library.base.errors import about

logger = logging.getLogger(__name__)

Size = tuple[int, int]
MOST_PIXELS = 4096 * 4096  # of a resolution; encoding an image of twice its sides takes 18 GB


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of a training image: resized to cover the bucket, then cropped to it."""

    bucket: Size
    resized: Size
    references: tuple["Shape", ...] = field(default=(), repr=False)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The bucket size and the sizes of the references, which are the same for all images of a batch."""
        return self.bucket, *(reference.bucket for reference in self.references)


@dataclass(frozen=True)
class BucketRules:
    """The bucket keys of a dataset; `checked` rounds them."""

    resolution: Size
    enable_bucket: bool
    min_reso: int
    max_reso: int
    step: int
    no_upscale: bool
    needed_step: int = 64  # the base model needs sides, and crops of references, that are multiples of this

    def checked(self) -> "BucketRules":
        """Round the limits to the step, with a warning. Raises UserError if they conflict with the resolution or the
        base model."""
        resolution, step, needed_step = self.resolution, self.step, self.needed_step
        if min(resolution) <= 0:
            raise about("resolution")(f"is {resolution[0]}x{resolution[1]}; both sides must be positive")
        if resolution[0] * resolution[1] > MOST_PIXELS:
            raise about("resolution")(
                f"is {resolution[0]}x{resolution[1]}; the maximum is {MOST_PIXELS // 10**6} megapixels, "
                "such as 4096x4096, and base models work best far below it"
            )
        # Without buckets the other keys have no effect, so their defaults need not fit the resolution.
        if not self.enable_bucket:
            if self.no_upscale:
                logger.warning("bucket_no_upscale has no effect without enable_bucket: smaller images are enlarged")
            return self
        if step <= 0 or step % needed_step:
            raise about("bucket_reso_steps")(
                f"is {step}, but this model needs a multiple of {needed_step}", f"set {needed_step}"
            )
        # The limits are unused here, so they need not fit the resolution. sd-scripts refuses those that do not.
        if self.no_upscale:
            logger.warning("bucket_no_upscale: min_bucket_reso and max_bucket_reso have no effect")
            return self
        if step > min(resolution):
            raise about("bucket_reso_steps")(
                f"is {step}, more than the shorter side of the resolution {resolution}: no bucket fits",
                f"lower bucket_reso_steps to {needed_step} or another multiple of it",
            )
        side = math.isqrt(resolution[0] * resolution[1])
        if resolution[0] % step or resolution[1] % step:
            logger.warning(
                "resolution %dx%d is not a multiple of bucket_reso_steps %d: square images are trained at %dx%d",
                *resolution,
                step,
                *[side // step * step] * 2,
            )
        low, high = self.min_reso // step * step, -(-self.max_reso // step) * step
        if (low, high) != (self.min_reso, self.max_reso):
            limits = f"{self.min_reso}..{self.max_reso} are rounded to {low}..{high}"
            logger.warning("bucket limits %s, multiples of bucket_reso_steps %d", limits, step)
        if low > min(resolution):
            raise about("min_bucket_reso")(f"is {low}, more than the shorter side of the resolution {resolution}")
        if high < max(resolution):
            raise about("max_bucket_reso")(f"is {high}, less than the longer side of the resolution {resolution}")
        # A min_reso below the step, such as the 0 of `flat_datasets`, rounds down to 0, which no bucket can have.
        return replace(self, min_reso=max(low, step), max_reso=high)


def bucket_sizes(resolution: Size, low: int, high: int, step: int) -> list[Size]:
    """Return all bucket sizes: sides from `low` to `high` in steps, as large as the area of `resolution` allows, in
    both orientations."""
    area = resolution[0] * resolution[1]
    side = math.isqrt(area) // step * step
    # The loop does not always yield the square: for 768x512 in steps of 64, width 576 gives height 640.
    sizes = {(side, side)}
    # A wider bucket would be lower than `low`. Without this bound, a huge `high` would make the loop endless in
    # practice.
    for width in range(low, min(high, area // low) + 1, step):
        height = min(high, area // width // step * step)
        if height >= low:
            sizes |= {(width, height), (height, width)}
    # In the order of sd-scripts: `nearest_bucket` takes the first of equally near buckets.
    return sorted(sizes)


def cover(image: Size, target: Size) -> Size:
    """Return the size of the image scaled to just cover the target."""
    if image[0] / image[1] > target[0] / target[1]:
        scale = target[1] / image[1]
    else:
        scale = target[0] / image[0]
    # Halves round up as in sd-scripts; round() would take the even neighbour.
    return int(image[0] * scale + 0.5), int(image[1] * scale + 0.5)


def nearest_bucket(image: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket of equal size if there is one, else the first of those with the nearest aspect ratio."""
    if image in buckets:
        return image
    ratio = image[0] / image[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def shape_without_upscale(image: Size, resolution: Size, step: int) -> Shape:
    """Return the shape of an image without enlarging it. An image larger than the area of `resolution` is shrunk to it;
    both sides are then rounded down to the step.

    A side shorter than the step gets a bucket side of one step. Only then is the image enlarged, just enough to cover
    it.
    """
    width, height = image
    area = resolution[0] * resolution[1]
    resized = image
    if width * height > area:
        ratio = width / height
        ideal_width = math.sqrt(area * ratio)
        ideal_height = area / ideal_width
        # As in sd-scripts, either side of the ideal size is rounded down to the step and the other one follows. The
        # candidate whose bucket has the nearer aspect ratio wins.
        wide = int(ideal_width + 0.5) // step * step
        by_width = (wide, int(wide / ratio + 0.5))
        tall = int(ideal_height + 0.5) // step * step
        by_height = (int(tall * ratio + 0.5), tall)
        candidates = [size for size in (by_height, by_width) if min(size) > 0]
        resized = min(candidates, key=lambda size: abs(_floored_ratio(size, step) - ratio), default=image)
    # Without max(), a 63x300 image would get a bucket of 0x256, as it does in sd-scripts.
    bucket = (max(resized[0] // step * step, step), max(resized[1] // step * step, step))
    if resized[0] < bucket[0] or resized[1] < bucket[1]:
        resized = cover(image, bucket)
    return Shape(bucket, resized)


def _floored_ratio(size: Size, step: int) -> float:
    return max(size[0] // step * step, step) / max(size[1] // step * step, step)


def assign_shapes(images: Sequence[Size], rules: BucketRules) -> list[Shape]:
    shape_by_size: dict[Size, Shape] = {}
    if rules.enable_bucket and not rules.no_upscale:
        buckets = bucket_sizes(rules.resolution, rules.min_reso, rules.max_reso, rules.step)
    for image in images:
        if image in shape_by_size:
            continue
        if not rules.enable_bucket:
            shape_by_size[image] = Shape(rules.resolution, cover(image, rules.resolution))
        elif rules.no_upscale:
            shape_by_size[image] = shape_without_upscale(image, rules.resolution, rules.step)
        else:
            bucket = nearest_bucket(image, buckets)
            shape_by_size[image] = Shape(bucket, cover(image, bucket))
    return [shape_by_size[image] for image in images]


@dataclass(frozen=True)
class ReferenceRules:
    """The sizes of reference images: the bucket of their image, unless one of the fields says otherwise."""

    resolution: Size | None  # references get buckets of this area
    no_resize: bool  # references are cropped to multiples of the step, shrunk only if larger than `resolution`
    step: int

    @cached_property
    def buckets(self) -> list[Size]:
        assert self.resolution is not None
        return bucket_sizes(self.resolution, self.step, 4 * max(self.resolution), self.step)

    def shape(self, image: Size, target_image: Size, target: Shape) -> Shape:
        """Return the shape of a reference of size `image`. By default, one of the same size as its target has the
        target's shape."""
        if self.no_resize:
            return shape_without_upscale(image, self.resolution or image, self.step)
        if self.resolution is None and image == target_image:
            return target
        bucket = target.bucket if self.resolution is None else nearest_bucket(image, self.buckets)
        return Shape(bucket, cover(image, bucket))


def crop_ltrb(bucket: Size, image: Size) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the image fitted *inside* the bucket.

    Denoisers are conditioned on these values, and existing adapters depend on them, although the pixels are cropped
    from an image that covers the bucket.
    """
    ratio = image[0] / image[1]
    if bucket[0] / bucket[1] > ratio:
        width, height = bucket[1] * ratio, float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] / ratio
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def ratio_error(bucket: Size, image: Size) -> float:
    """Return the difference of the bucket's aspect ratio from the image's."""
    return abs(bucket[0] / bucket[1] - image[0] / image[1])
