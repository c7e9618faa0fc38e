"""Problems that only an image's pixels reveal: duplicates, blur, a single colour, damage."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from library.base.errors import list_few
from library.base.formatting import format_count
from library.data.description.buckets import Size
from library.data.description.schema import SubsetConfig
from library.data.plan.audit_pixels import PixelMeasures, connect_groups, measure_all_pixels, similar_pairs
from library.data.plan.samples import Sample
from library.data.scanned.images import ScannedImage
from library.data.sources.storage.storage import Storage

MOST_BITS = 6  # of 64: resized, recompressed or slightly cropped copies differ in up to 6, other images in about 20
BLURRED = 15.0  # variance of the Laplacian: an image blurred by 2 pixels has 5, a sharp one 50 or much more
TRANSPARENT = 0.01  # share of pixels; antialiased edges have fewer
CROPPED = 1 / 3  # share of the resized image that the crop to its bucket discards
EMPTY = 6.0  # standard deviation of 8-bit grey values: a single colour with some noise
# Pixels of screens. Phones' are told by their width and aspect, because their heights are many.
PHONE_WIDTHS = frozenset((640, 720, 750, 828, 1080, 1125, 1170, 1179, 1206, 1242, 1260, 1284, 1290, 1320, 1344, 1440))
LEAST_ASPECT, MOST_ASPECT = 16 / 9 - 0.01, 2.4  # of phones
OTHER_SCREENS = frozenset((
    (1280, 720), (1280, 800), (1366, 768), (1440, 900), (1600, 900), (1680, 1050), (1920, 1080), (1920, 1200),
    (2256, 1504), (2360, 1640), (2388, 1668), (2420, 1668), (2560, 1440), (2560, 1600), (2560, 1664), (2732, 2048),
    (2752, 2064), (2880, 1800), (2880, 1864), (3024, 1964), (3440, 1440), (3456, 2234), (3840, 2160), (5120, 2880),
))  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A problem and the affected images as (path, remark)."""

    text: str
    images: tuple[tuple[str, str], ...]

    @property
    def line(self) -> str:
        """The finding as a log line with the first few images."""
        return f"{self.text}: " + list_few(f"{path} ({note})" if note else path for path, note in self.images)

    def with_paths(self, shorten: Callable[[str], str]) -> "Finding":
        return replace(self, images=tuple((shorten(path), note) for path, note in self.images))


def inspect(
    samples: Sequence[Sample],
    subsets: Sequence[SubsetConfig],
    num_trained: int,
    storage: Storage,
    num_threads: int = 0,
    has_alpha: bool = False,
) -> list[Finding]:
    """Examine every image once, and return the findings. Images of datasets from index `num_trained` on are only
    used for validation. `has_alpha` tells that the base model encodes alpha channels."""
    largest: dict[str, tuple[ScannedImage, Size]] = {}
    for sample in samples:
        key, (bucket_width, bucket_height) = sample.image.key, sample.shape.bucket
        _, (width, height) = largest.get(key, (sample.image, (0, 0)))
        largest[key] = sample.image, (max(width, bucket_width), max(height, bucket_height))
    trained = {sample.image.key for sample in samples if sample.dataset < num_trained}
    masked = {sample.image.key for sample in samples if has_alpha or subsets[sample.subset].alpha_mask}
    measured = measure_all_pixels(list(largest.values()), storage, num_threads)
    return [*collect_findings(measured, trained), *find_file_kinds(measured, masked), *find_large_crops(samples)]


def find_file_kinds(measured: Sequence[PixelMeasures], masked: set[str]) -> Iterator[Finding]:
    """Yield findings about kinds of files. Transparency is expected in the images of `masked`, whose alpha is used."""
    yield from make_finding(
        [(image.path, f"{image.num_frames} frames") for image in measured if image.num_frames > 1],
        "{} animated; only the first frame is trained",
    )
    transparent = [image for image in measured if image.transparent > TRANSPARENT and image.path not in masked]
    yield from make_finding(
        [(image.path, f"{image.transparent:.0%}") for image in transparent],
        "{} partly transparent; the colors hidden there are trained: set alpha_mask = true, or flatten the image",
    )
    yield from make_finding(
        [(image.path, "") for image in measured if image.is_cmyk],
        "{} in CMYK, whose colors change in the conversion to RGB; re-save as sRGB",
    )
    yield from make_finding(
        [(image.path, "{}x{}".format(*image.size)) for image in measured if is_screenshot(image)],
        "{} like screenshots: of a screen's size, without a camera's data; crop bars and texts away, which are learned",
    )


def is_screenshot(image: PixelMeasures) -> bool:
    """Return True for an image of a screen's size that no camera has made."""
    long, short = max(image.size), min(image.size)
    is_phone = short in PHONE_WIDTHS and LEAST_ASPECT <= long / short <= MOST_ASPECT
    return not image.has_camera and (is_phone or (long, short) in OTHER_SCREENS)


def find_large_crops(samples: Sequence[Sample]) -> Iterator[Finding]:
    """Yield a finding about images that lose a large part to the crop to their training size."""
    lost: dict[str, float] = {}
    for sample in samples:
        (width, height), (wide, tall) = sample.shape.bucket, sample.shape.resized
        share = 1 - min(width, wide) * min(height, tall) / (wide * tall)
        if share > CROPPED:
            lost[sample.image.key] = max(share, lost.get(sample.image.key, 0.0))
    text = "{} of which a third or more is cropped away; use buckets with more aspect ratios, or crop by hand"
    yield from make_finding([(key, f"{share:.0%} lost") for key, share in lost.items()], text)


def collect_findings(measured: Sequence[PixelMeasures], trained: set[str]) -> Iterator[Finding]:
    """Yield the findings about the measured pixels, most severe first."""
    damaged = [(image.path, image.problem) for image in measured if image.problem is not None]
    yield from make_finding(damaged, "{} cannot be decoded and would be skipped; re-save or remove")
    decodable = [image for image in measured if image.problem is None]
    empty = [image for image in decodable if image.contrast < EMPTY]
    yield from make_finding(
        [(image.path, f"contrast {image.contrast:.1f}") for image in empty], "{} of a single colour; remove"
    )
    detailed = [image for image in decodable if image.contrast >= EMPTY]  # images of a single colour are all similar
    groups = connect_groups(list(similar_pairs([image.hash for image in detailed], MOST_BITS)))
    across: list[tuple[str, str]] = []
    within: list[tuple[str, str]] = []
    for number, group in enumerate(groups, 1):
        paths = [detailed[index].path for index in group]
        are_trained = {path in trained for path in paths}
        (across if len(are_trained) == 2 else within).extend((path, f"group {number}") for path in paths)
    yield from make_finding(
        [(path, f"{note}, {'trained' if path in trained else 'validation'}") for path, note in across],
        "{} near-duplicated between training and validation, which then measures memorization; keep each motif on one "
        "side",
    )
    yield from make_finding(within, "{} near-duplicated; consider keeping one per group")
    blurred = [(image.path, f"sharpness {image.sharpness:.0f}") for image in detailed if image.sharpness < BLURRED]
    yield from make_finding(blurred, "{} blurred all over; the LoRA may learn blur: remove or replace")


def make_finding(images: Iterable[tuple[str, str | None]], text: str) -> Iterator[Finding]:
    """Yield the finding, unless there are no affected images."""
    listed = tuple((path, note or "") for path, note in images)
    if listed:
        yield Finding(text.format(format_count(len(listed), "image")), listed)
