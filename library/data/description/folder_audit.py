"""What lies in a folder and is not trained: files that a subset does not read, and pictures that stand in it twice."""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from library.data.batches.images import picture_extensions
from library.data.sources.scan import Picture, ScannedSubset, few

CAPTION_ENDINGS = (".txt", ".caption", ".cap", ".tags")  # that tools for captions write
OTHER_PICTURES = frozenset((".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".tga", ".psd"))
MOST_COMPARED = 20_000  # pictures; looking for equal ones reads their sizes from the disk
MOST_VISITED = 2_000  # folders, where pictures are looked for deeper down

Line = tuple[int, str]


def folder_lines(subset: ScannedSubset) -> Iterator[Line]:
    """A line for each kind of file of image_dir that is left aside, and for pictures with the same content."""
    config = subset.config
    if config.style == "metadata" or not config.image_dir or not os.path.isdir(config.image_dir):
        return
    names = sorted(os.listdir(config.image_dir))
    source, read = f"  {config.source}:", set(picture_extensions())
    unread = [name for name in names if is_unread_picture(name, read)]
    if unread:
        effect = "pictures have endings that are not read; convert or rename them to .png or .jpg"
        yield logging.WARNING, f"{source} {len(unread)} {effect}: {few(unread)}"
    yield from caption_lines(subset, names, read | OTHER_PICTURES, source)
    if len(subset.pictures) <= MOST_COMPARED:
        pairs = [f"{os.path.basename(b)} is {os.path.basename(a)}" for a, b in equal_pictures(subset.pictures)]
        if pairs:
            yield logging.WARNING, f"{source} {len(pairs)} pictures are there twice and count twice: {few(pairs)}"


def is_unread_picture(name: str, read: set[str]) -> bool:
    """Whether a file is a picture by its ending, which is none of those in `read`."""
    ending = os.path.splitext(name)[1]
    return ending not in read and (ending.lower() in read or ending.lower() in OTHER_PICTURES)


def caption_lines(subset: ScannedSubset, names: Sequence[str], endings: set[str], source: str) -> Iterator[Line]:
    """Captions under another ending than caption_extension, and captions whose picture is missing.

    Pictures are files with one of `endings`, whatever its case.
    """
    wanted = subset.config.caption_extension
    stems = {os.path.splitext(os.path.basename(path))[0] for path in subset.without_caption}
    for ending in CAPTION_ENDINGS:
        beside = sum(name.endswith(ending) and name[: -len(ending)] in stems for name in names)
        if ending != wanted and beside:
            yield (
                logging.WARNING,
                f"{source} {beside} of the missing captions lie there as {ending} files, but caption_extension is "
                f'{wanted}: set caption_extension = "{ending}", or --caption_extension {ending}',
            )
    pictures = {stem for stem, ending in map(os.path.splitext, names) if ending.lower() in endings}
    shared = {stem.rsplit("_", 4)[0] for stem in pictures if stem.count("_") >= 4}  # of cuttings of one picture
    described = pictures | shared
    alone = [name for name in names if name.endswith(wanted) and name[: -len(wanted)] not in described]
    if alone:
        yield logging.WARNING, f"{source} {len(alone)} captions have no picture: {few(alone)}"


def equal_pictures(pictures: Iterable[Picture]) -> Iterator[tuple[str, str]]:
    """(path, path of the same content): only files of one size are read."""
    of_size: dict[int, list[str]] = defaultdict(list)
    for picture in pictures:
        of_size[os.path.getsize(picture.path)].append(picture.path)
    for paths in of_size.values():
        first: dict[str, str] = {}
        for path in paths if len(paths) > 1 else ():
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            if digest in first:
                yield first[digest], path
            else:
                first[digest] = path


def pictures_below(folder: str) -> str:
    """A hint for a folder without pictures: how many lie in its subfolders; empty where none do."""
    found: dict[str, int] = {}
    endings = picture_extensions()
    for number, (inside, _, names) in enumerate(os.walk(folder)):
        if number > MOST_VISITED:
            break
        count = sum(name.endswith(endings) for name in names)
        if count and inside != folder:
            found[inside] = count
    if not found:
        return ""
    places = few([f"{path} ({count})" for path, count in found.items()], 3)
    return f"; {sum(found.values())} lie in folders below it, which are not searched: {places}"
