"""Ignored files in image folders, and duplicate images."""

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from library.base.errors import list_few
from library.base.formatting import format_count
from library.data.description.image_extensions import group_unread, image_extensions, list_unread
from library.data.scanned.images import ScannedImages
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders.listing import CAPTION_ENDINGS

MOST_COMPARED = 20_000  # images; the search for duplicates reads all file sizes
MOST_VISITED = 2_000  # subfolders searched for images

Line = tuple[int, str]
"""(logging level, text)."""


def folder_lines(subset: ScannedSubset, are_trained: bool = True) -> Iterator[Line]:
    """Yield a line for each kind of ignored file in image_dir, and one about duplicates if the images are trained."""
    config = subset.config
    if config.style == "metadata" or not config.image_dir or not os.path.isdir(config.image_dir):
        return
    source = f"  {config.source}:"
    unread = list_unread(subset.aside)
    for effect, names in group_unread(unread).items():
        yield logging.WARNING, f"{source} {len(names)} images {effect}: {list_few(names)}"
    yield from caption_lines(subset, unread, source)
    if are_trained and len(subset.images) <= MOST_COMPARED:
        pairs = [f"{os.path.basename(b)} = {os.path.basename(a)}" for a, b in equal_images(subset.images)]
        if pairs:
            yield (
                logging.WARNING,
                f"{source} {format_count(len(pairs), 'duplicate image')}, each trained twice: {list_few(pairs)}",
            )


def caption_lines(subset: ScannedSubset, unread: Sequence[str], source: str) -> Iterator[Line]:
    """Yield lines about captions whose extension is not caption_extension, and about captions without an image.
    Captions of unsupported images are not counted."""
    extension = subset.config.caption_extension
    stems = {os.path.splitext(os.path.basename(path))[0] for path in subset.without_caption}
    count_by_ending = Counter(name.rpartition(".")[2] for name in subset.aside if os.path.splitext(name)[0] in stems)
    for ending, count in sorted(count_by_ending.items()):
        if ending.lower() in CAPTION_ENDINGS:
            yield (
                logging.WARNING,
                f"{source} {count} of the missing captions exist as .{ending} files, but caption_extension is "
                f'{extension}: set caption_extension = ".{ending}", or --caption_extension .{ending}',
            )
    image_stems = {os.path.splitext(name)[0] for name in unread}
    alone = [name for name in subset.alone if name[: -len(extension)] not in image_stems]
    if alone:
        yield logging.WARNING, f"{source} {format_count(len(alone), 'caption')} without an image: {list_few(alone)}"


def equal_images(images: ScannedImages) -> Iterator[tuple[str, str]]:
    """Yield (path, path of a later copy) of images with the same content. Only files of equal size are read."""
    paths_by_size: dict[int, list[str]] = defaultdict(list)
    for path in images.each_key():
        paths_by_size[os.path.getsize(path)].append(path)
    for paths in paths_by_size.values():
        path_by_digest: dict[str, str] = {}
        for path in paths if len(paths) > 1 else ():
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            if digest in path_by_digest:
                yield path_by_digest[digest], path
            else:
                path_by_digest[digest] = path


def images_below(folder: str) -> str:
    """Return a hint about images in the subfolders of a folder that has none itself, or ""."""
    count_by_folder: dict[str, int] = {}
    endings = image_extensions()
    for number, (subfolder, _, names) in enumerate(os.walk(folder)):
        if number > MOST_VISITED:
            break
        count = sum(name.endswith(endings) for name in names)
        if count and subfolder != folder:
            count_by_folder[subfolder] = count
    if not count_by_folder:
        return ""
    examples = list_few([f"{path} ({count})" for path, count in count_by_folder.items()], 3)
    return f"; {sum(count_by_folder.values())} are in its subfolders, which are not searched: {examples}"
