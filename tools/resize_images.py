"""Write smaller copies of the images of a folder, at one or several resolutions, for datasets of several sizes.

Each image keeps its aspect ratio. A resolution is an area, so 512x512 turns a tall image of ratio 1:2 into 362x724.
Images are never enlarged. `cat.png` becomes `cat+512x512.jpg`; other files are copied, except caches of the old images.
Training resizes images by itself: this command saves disk space and the time to read large files.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from filecmp import cmp
from functools import partial
from hashlib import blake2b
from math import sqrt
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from PIL import Image
from tqdm import tqdm

from library.base.atomic_files import copy_atomically
from library.base.command_parser import make_parser
from library.base.errors import about, error_in
from library.base.terminal import print_line
from library.checkpoints.marks import mark_of, save_image
from library.checkpoints.overwriting import FileKind, check_target, marked
from library.commands.command import check_at_least_one, command
from library.data.decoding.images import Pixels, read_pixels, resize
from library.data.description.buckets import Size
from library.data.description.image_extensions import describe_unread, image_extensions

DEFAULT_RESOLUTIONS = "512x512,384x384,256x256,128x128"
FILTERS = {name: name for name in ("area", "cubic", "nearest", "linear", "box")} | {"lanczos4": "lanczos"}
WRITER = "tools/resize_images.py"
CACHES = (".npz", "metadata_cache.json")  # endings of files derived from the old images
EXAMPLES = """\
  python3 tools/resize_images.py pictures pictures_small --max_resolution 1024x1024,512x512 --divisible_by 64 \\
      --copy_associated_files"""


@dataclass(frozen=True)
class Resizing:
    """Settings for resizing each image."""

    resolutions: tuple[Size, ...]
    divisible_by: int
    interpolation: str | None
    ending: str  # ".png" or ".jpg"

    def suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of the new file names."""
        return tuple(f"+{width}x{height}" for width, height in self.resolutions)


def parse_resolutions(text: str) -> tuple[Size, ...]:
    """Parse `1024x1024,512x512` to sizes. Raises UserError for anything else."""
    matches = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    sizes = tuple((int(match[1]), int(match[2])) for match in matches if match is not None)
    if len(sizes) < len(matches) or not all(map(min, sizes)):
        raise about("--max_resolution")(f'is "{text}"', "use sizes such as 1024x1024, separated by commas")
    return sizes


def fit_size(size: Size, limit: Size) -> Size:
    """Return an image size scaled down to the area of `limit`, with the same aspect ratio."""
    factor = min(1.0, sqrt(limit[0] * limit[1] / (size[0] * size[1])))
    return (max(1, int(size[0] * factor)), max(1, int(size[1] * factor)))


def resize_image(pixels: Pixels, limit: Size, resizing: Resizing) -> Pixels:
    """Scale an image to the area of `limit`, and crop it at the centre to divisible sides."""
    scaled = resize(pixels, fit_size((pixels.shape[1], pixels.shape[0]), limit), resizing.interpolation)
    height, width = (side - side % resizing.divisible_by for side in scaled.shape[:2])
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    return scaled[top : top + height, left : left + width]


def write_sizes(image: Path, folder: Path, resizing: Resizing) -> None:
    """Write one image at every resolution. Raises UserError if it cannot be read or is too small."""
    pixels, _ = read_pixels(str(image))
    for limit, suffix in zip(resizing.resolutions, resizing.suffixes(), strict=True):
        resized = resize_image(pixels, limit, resizing)
        if 0 in resized.shape:
            raise error_in("--divisible_by", path=image)(
                f"{image} has less than --divisible_by {resizing.divisible_by} pixels on a side"
            )
        path = folder / f"{image.stem}{suffix}{resizing.ending}"
        save_image(path, Image.fromarray(resized), make_mark(image, path))


def make_mark(image: Path, path: Path) -> str:
    """Return the mark of a smaller copy, which holds a digest of the original's path: others replace none."""
    digest = blake2b(os.fsencode(image.resolve()), digest_size=8)
    return mark_of(f"{WRITER} {digest.hexdigest()}", path)


def check_targets(
    images: Sequence[Path], copies: Sequence[tuple[Path, Path]], target: Path, resizing: Resizing
) -> None:
    """Raise UserError if the target folder has files that would be lost."""
    for image in images:
        for suffix in resizing.suffixes():
            path = target / f"{image.stem}{suffix}{resizing.ending}"
            check_target("dst_img_folder", path, marked(f"a smaller copy of {image}", make_mark(image, path)))
    for file, path in copies:
        check_target("dst_img_folder", path, FileKind(f"a copy of {file}", partial(cmp, file, shallow=False)))


def check_names(images: Sequence[Path]) -> None:
    """Raise UserError if two images would be written to the same file."""
    names: dict[str, Path] = {}
    for image in images:
        other = names.setdefault(image.stem, image)
        if other is not image:
            raise error_in(path=image, cause="would be lost")(
                f"{other} and {image.name} differ only in their extension", "rename one of them"
            )


def resize_all(args: argparse.Namespace) -> None:
    """Write every image of a folder at every resolution, and copy the other files."""
    source, target = args.src_img_folder, args.dst_img_folder
    if not source.is_dir():
        raise error_in(path=source)(f"{source} is not a folder")
    if target.resolve() == source.resolve():
        raise error_in(path=target, cause="would be lost")(
            f"{target} is the folder of the images themselves", "use another one for the new files"
        )
    check_at_least_one(args, "divisible_by")
    filter_name = FILTERS[args.interpolation] if args.interpolation else None
    ending = ".png" if args.save_as_png else ".jpg"
    resizing = Resizing(parse_resolutions(args.max_resolution), args.divisible_by, filter_name, ending)
    files = sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix in image_extensions()]
    if not images:
        unread = describe_unread(path.name for path in files)
        raise error_in(path=source)(f"{source} has no images; subfolders are not searched{unread}")
    check_names(images)
    others = [path for path in files if path not in set(images) and not path.name.endswith(CACHES)]
    copies = plan_copies(others, images, target, resizing, args)
    check_targets(images, copies, target, resizing)
    target.mkdir(parents=True, exist_ok=True)
    for image in tqdm(images, desc="resizing", unit="image"):
        write_sizes(image, target, resizing)
    for file, copy in copies:
        copy_atomically(file, copy)
    print_line(f"{target}: {len(images)} images at {len(resizing.resolutions)} resolutions, {len(copies)} other files")


def plan_copies(
    files: Sequence[Path], images: Sequence[Path], target: Path, resizing: Resizing, args: argparse.Namespace
) -> list[tuple[Path, Path]]:
    """Return the other files with their copies, on request a copy per resolution of those named like an image."""
    stems = {image.stem for image in images}
    return [
        (file, target / f"{file.stem}{suffix}{file.suffix}")
        for file in files
        for suffix in (resizing.suffixes() if args.copy_associated_files and file.stem in stems else ("",))
    ]


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("src_img_folder", type=Path, help="the folder of images")
    parser.add_argument("dst_img_folder", type=Path, help="the folder to write to")
    parser.add_argument("--max_resolution", default=DEFAULT_RESOLUTIONS, help="areas: 1024x1024,512x512")
    parser.add_argument("--divisible_by", type=int, default=1, help="cut sides to multiples of this")
    parser.add_argument("--interpolation", choices=tuple(FILTERS), help="filter; unset: area, which averages")
    parser.add_argument("--save_as_png", action="store_true", help="write .png instead of .jpg")
    parser.add_argument("--copy_associated_files", action="store_true", help="copy captions and the like for each size")
    return parser


main = command(setup_parser, resize_all)

if __name__ == "__main__":
    sys.exit(main())
