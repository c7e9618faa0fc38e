"""From folders and metadata files to pictures: paths, captions, sizes. Nothing is decoded."""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import compress
from typing import TypeVar

import numpy as np

from library.data.batches.images import picture_extensions, read_size
from library.data.batches.threads import in_blocks
from library.data.description.buckets import Size
from library.data.description.captions import CaptionRules
from library.data.description.schema import DatasetConfig, SubsetConfig
from library.data.sources.columns import Texts
from library.data.sources.folder_cache import CacheRow, FolderCache, fingerprint
from library.data.sources.image_headers import HEAD_BYTES, plain_size
from library.data.sources.metadata_file import MetadataEntry, read_metadata
from library.data.sources.picture_index import UNSETTLED, Table, open_index, read_stamped, renewed, stamp_of
from library.data.sources.pictures import Pictures
from library.errors import UserError
from library.options.config_file import BACKSLASH_HINT
from library.options.encodings import likely_encoding, not_utf8

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

OTHER_PICTURES = frozenset(("gif", "tif", "tiff", "heic", "heif", "avif", "jxl", "tga", "psd"))
CAPTION_ENDINGS = ("txt", "caption", "cap", "tags")  # that tools for captions write
MOST_CAPTION_BYTES = 1 << 20  # counting the tokens of ten times as much takes a minute


@dataclass(frozen=True)
class ScannedSubset:
    """What was found for a subset."""

    config: SubsetConfig
    pictures: Pictures
    dropped: tuple[tuple[str, str], ...] = ()  # key, reason
    without_caption: Sequence[str] = ()  # keys
    empty_caption: Sequence[str] = ()
    small: Sequence[str] = ()  # left out by skip_image_resolution
    aside: Sequence[str] = ()  # names in image_dir that end like pictures or captions and are not read
    alone: Sequence[str] = ()  # names of captions in image_dir that are no picture's


@dataclass(frozen=True)
class ScannedDataset:
    """What was found for a dataset."""

    config: DatasetConfig
    subsets: tuple[ScannedSubset, ...]


@dataclass
class _Listing:
    """The pictures of a subset, column by column: a hundred thousand of them take a moment to make."""

    config: SubsetConfig
    paths: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    sizes: list[Size | str] = field(default_factory=list)  # of a picture that cannot be read: why
    masks: list[str] | None = None
    tags: list[str] | None = None
    dropped: list[tuple[str, str]] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    empty_caption: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    def found(self) -> ScannedSubset:
        """The pictures with a size, as columns that need no object for each."""
        unreadable = [(path, size) for path, size in zip(self.paths, self.sizes, strict=True) if isinstance(size, str)]
        keeps = [isinstance(size, tuple) for size in self.sizes] if unreadable else None

        def readable(column: list[Value]) -> list[Value]:
            return column if keeps is None else list(compress(column, keeps))

        sizes_N2 = np.array(readable(self.sizes), dtype=np.int32).reshape(-1, 2)
        paths = readable(self.paths)
        prefix = "" if self.config.style == "metadata" else os.path.join(self.config.image_dir or "", "")
        pictures = Pictures(
            Texts.of(path[len(prefix) :] for path in paths) if prefix else Texts.of(paths),
            Texts.of(readable(self.captions)),
            sizes_N2,
            prefix,
            None if self.masks is None else Texts.of(readable(self.masks)),
            None if self.tags is None else Texts.of(readable(self.tags)),
        )
        dropped = (*self.dropped, *unreadable)
        return ScannedSubset(
            self.config,
            pictures,
            dropped,
            tuple(self.without_caption),
            tuple(self.empty_caption),
            aside=tuple(self.aside),
            alone=tuple(self.alone),
        )


def collect_files(config: SubsetConfig, num_threads: int) -> ScannedSubset:
    """The pictures of a folder or of a metadata file, in the order of their paths."""
    if config.style == "metadata":
        listing = list_metadata(config, num_threads)
    else:
        listing = list_folder(config, num_threads)
    if config.style == "masked":
        add_masks(listing)
    return listing.found()


# Folders


@dataclass(frozen=True)
class Folder:
    """The files directly in a folder, by name."""

    pictures: list[str]  # sorted
    dropped: list[tuple[str, str]]  # path of what has a picture's name but is no file, and why
    captions: set[str]
    aside: list[str]  # names that end like pictures or captions and are neither


def look_into(folder: str, caption_extension: str | None = None) -> Folder:
    """List a folder without opening anything in it."""
    endings = {extension[1:] for extension in picture_extensions()}
    similar = {extension.lower() for extension in (*endings, *OTHER_PICTURES, *CAPTION_ENDINGS)}
    found = Folder([], [], set(), [])
    with opened_folder(folder) as entries:
        for entry in entries:
            name = entry.name
            ending = name.rpartition(".")[2]
            is_picture = ending in endings and "." in name
            if not is_picture and (caption_extension is None or not name.endswith(caption_extension)):
                if ending.lower() in similar and "." in name:
                    found.aside.append(name)
                continue
            try:
                if entry.is_file():
                    add = found.pictures.append if is_picture else found.captions.add
                    add(name)
                elif is_picture and entry.is_symlink() and not entry.is_dir():
                    found.dropped.append((os.path.join(folder, name), "is a link to nothing"))
            except OSError as error:
                if is_picture:
                    found.dropped.append((os.path.join(folder, name), f"cannot be followed: {error.strerror}"))
                else:
                    found.captions.add(name)  # whoever reads it learns why not
    found.pictures.sort()
    found.dropped.sort()
    return found


def opened_folder(folder: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    """os.scandir, whose error says what to do."""
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}; change its rights, or leave it out") from error


def list_folder(config: SubsetConfig, num_threads: int) -> _Listing:
    """The pictures of image_dir with their captions and sizes, from the folder's index where that is still true."""
    folder = config.image_dir or ""
    listing = _Listing(config)
    if not os.path.isdir(folder):
        escaped = any(character < " " for character in folder)  # "C:\\train" in TOML has a tab in it
        hint = f": {BACKSLASH_HINT}" if escaped else ""
        logger.warning("image_dir %s is not a folder%s", repr(folder) if escaped else folder, hint)
        return listing
    inside = look_into(folder, config.caption_extension)
    files = caption_files(folder, inside, config.caption_extension)
    prefix = os.path.join(folder, "")
    listing.paths = [prefix + name for name in inside.pictures]
    listing.dropped, listing.aside = inside.dropped, inside.aside
    listing.alone = sorted(inside.captions.difference(files))
    try:
        if config.cache_info:
            texts = read_with_cache(listing, files, num_threads)
        else:
            texts = read_with_index(listing, inside.pictures, files, num_threads)
    except NotUtf8:
        check_encodings(folder, (file for file in files if file is not None))
        raise
    listing.captions = [caption_of(text, config.captions) for text in texts]
    if None in files or "" in listing.captions:
        note_missing(listing, files)
    return listing


def note_missing(listing: _Listing, files: Sequence[str | None]) -> None:
    """Put class_tokens in the place of captions without a file, and list what is missing or empty."""
    for place, (path, file) in enumerate(zip(listing.paths, files, strict=True)):
        if file is None:
            listing.captions[place] = listing.config.class_tokens or ""
            listing.without_caption.append(path)
        elif not listing.captions[place]:
            listing.empty_caption.append(path)


def caption_files(folder: str, inside: Folder, extension: str) -> Sequence[str | None]:
    """The name of each picture's caption file; None where there is none."""
    own = [(picture[: picture.rindex(".")] or picture) + extension for picture in inside.pictures]
    if inside.captions.issuperset(own):
        return own
    return [name if name in inside.captions else other_caption_file(folder, name, extension) for name in own]


def other_caption_file(folder: str, own: str, extension: str) -> str | None:
    """The caption file of a picture whose own is not in the listing of the folder."""
    names, stem = [own], own.removesuffix(extension)  # a file system may find the first, spelt in another way
    if stem.count("_") >= 4:  # face detection names its cuttings `..._cx_cy_w_h`
        names.append(stem.rsplit("_", 4)[0] + extension)
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)


def read_with_index(
    listing: _Listing, pictures: list[str], files: Sequence[str | None], num_threads: int
) -> Sequence[str]:
    """Fill in sizes and give the text of each picture's caption file, from the index of the folder and the files."""
    config, folder = listing.config, listing.config.image_dir or ""
    index = open_index(folder, len(pictures))
    names = list(dict.fromkeys(file for file in files if file is not None))
    known_captions = index.captions.get(config.caption_extension, Table())
    captions = renewed(known_captions, folder, names, read_caption, num_threads, None)
    title = f"reading sizes of {config.base_name}"
    sizes = renewed(index.sizes, folder, pictures, size_of, num_threads, title)
    if config.keeps_index:
        index.replace_with(sizes, index.captions | {config.caption_extension: captions})
    listing.sizes = sizes.values
    if len(names) == len(files):
        return captions.values
    texts: dict[str | None, str] = dict(zip(names, captions.values, strict=True))
    return [texts.get(file, "") for file in files]


def read_with_cache(listing: _Listing, files: Sequence[str | None], num_threads: int) -> Sequence[str]:
    """The same from sd-scripts' metadata_cache.json, which is written anew."""
    config = listing.config
    cache = FolderCache.open(config)

    def read(block: Sequence[int]) -> list[CacheRow]:
        return [cached_or_read(cache, listing, place, files[place]) for place in block]

    rows = in_blocks(read, range(len(listing.paths)), num_threads, f"reading sizes of {config.base_name}")
    if config.keeps_index:
        cache.write(row for row in rows if not isinstance(row[2], str))
    listing.sizes = [row[2] for row in rows]
    return [row[1] for row in rows]


def cached_or_read(cache: FolderCache, listing: _Listing, place: int, file: str | None) -> CacheRow:
    """Path, caption, size and what both were read from, of one picture and its caption file."""
    config, path = listing.config, listing.paths[place]
    caption_path = None if file is None else os.path.join(config.image_dir or "", file)
    picture_print = fingerprint(path)
    caption_print = None if caption_path is None else fingerprint(caption_path)
    known = cache.lookup(path, picture_print, caption_print)
    size: Size | str
    if known is None:
        text = "" if caption_path is None else caption_of(read_caption(caption_path)[1], config.captions)
        size = size_of(path)[1]
    else:
        text, size = known
    return path, config.class_tokens or "" if file is None else text, size, picture_print, caption_print


class NotUtf8(UserError):
    """A caption file in another encoding."""


def check_encodings(folder: str, names: Iterable[str]) -> None:
    """Raise UserError naming all caption files that are not UTF-8, with the encoding that fits each."""
    wrong = []
    for name in names:
        try:
            read_caption(os.path.join(folder, name))
        except NotUtf8 as error:
            wrong.append((name, likely_encoding(read_stamped(os.path.join(folder, name))[1]) or "no encoding fits"))
            first = error
    if len(wrong) == 1:
        raise first
    if wrong:
        listed = few([f"{name} ({encoding})" for name, encoding in wrong], 20)
        raise UserError(
            f"{len(wrong)} caption files in {folder} are not UTF-8; save them as UTF-8. The encoding that fits each: "
            f"{listed}"
        )


def read_caption(path: str) -> tuple[int, str]:
    """(stamp, lines of a caption file, each stripped); ValueError names a file that cannot be read."""
    try:
        status, content = read_stamped(path)
        if len(content) > MOST_CAPTION_BYTES:
            raise UserError(
                f"the caption file {path} has {len(content) / 1e6:.1f} MB; no caption is that long, so it seems to be "
                "another kind of file: put it elsewhere, or set another caption_extension"
            )
        text = content.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(f"the caption file {path} {not_utf8(content, error)}") from None
    except OSError as error:
        raise UserError(f"the caption file {path} cannot be read: {error.strerror}") from None
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return stamp_of(status, time.time_ns()), "\n".join([line.strip() for line in lines]).rstrip("\n")


def size_of(path: str) -> tuple[int, Size | str]:
    """(stamp, size of a picture); in place of the size the reason why there is none."""
    try:
        status, head = read_stamped(path, HEAD_BYTES)
        size = plain_size(head, status.st_size) or read_size(path)
    except (ValueError, OSError) as error:
        return UNSETTLED, str(error).removeprefix(path).strip() or "unknown"
    return stamp_of(status, time.time_ns()), size


def caption_of(text: str, rules: CaptionRules) -> str:
    """The caption in the stripped lines of a file: the first, or with enable_wildcard every one that is not blank."""
    if "\n" not in text:
        return text
    if rules.enable_wildcard:
        return "\n".join(line for line in text.split("\n") if line)
    return text.partition("\n")[0]


# Masks


def add_masks(listing: _Listing) -> None:
    """Find the mask of every picture; ValueError names those without one and masks without a picture."""
    folder = listing.config.conditioning_data_dir or ""
    if not os.path.isdir(folder):
        raise UserError(f"conditioning_data_dir {folder} is not a folder")
    masks: dict[str, str] = {}
    for name in look_into(folder).pictures:
        masks.setdefault(os.path.splitext(name)[0], os.path.join(folder, name))
    stems = [os.path.splitext(os.path.basename(path))[0] for path in listing.paths]
    missing = [path for path, stem in zip(listing.paths, stems, strict=True) if stem not in masks]
    if missing:
        raise UserError(f"{len(missing)} pictures have no mask in {folder}: {few(missing)}")
    surplus = [masks[stem] for stem in sorted(masks.keys() - set(stems))]
    if surplus:
        raise UserError(
            f"{len(surplus)} masks in {folder} belong to no picture of {listing.config.image_dir}: {few(surplus)}"
        )
    listing.masks = [masks[stem] for stem in stems]


# Metadata files


def list_metadata(config: SubsetConfig, num_threads: int) -> _Listing:
    """The pictures that a metadata file names."""
    listing = _Listing(config)
    listings: dict[str, dict[str, str]] = {}
    tags: list[str] = []
    for key, entry in read_metadata(config.metadata_file or ""):
        path = find_picture(key, config.image_dir, listings)
        if path is None:
            listing.dropped.append(
                (key, "there is no such picture" + (f" in {config.image_dir}" if config.image_dir else ""))
            )
            continue
        caption = combined_caption(entry, config.captions)
        if entry.caption is None and entry.tags is None:
            listing.without_caption.append(path)
        elif not caption:
            listing.empty_caption.append(path)
        listing.paths.append(path)
        listing.captions.append(caption)
        tags.append(entry.tags or "")
    listing.tags = tags
    listing.sizes = sizes_anywhere(
        listing.paths, num_threads, f"reading sizes of {config.base_name}", config.keeps_index
    )
    return listing


def sizes_anywhere(paths: Sequence[str], num_threads: int, title: str, keeps_index: bool) -> list[Size | str]:
    """The sizes of pictures that may lie in several folders, from the indices of those with many."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_folder[os.path.dirname(path)].append(os.path.basename(path))
    sizes: dict[str, Size | str] = {}
    for folder, names in by_folder.items():
        names.sort()
        index = open_index(folder or ".", len(names))
        table = renewed(index.sizes, folder or ".", names, size_of, num_threads, title)
        if keeps_index:
            index.replace_with(table, index.captions)
        sizes.update((os.path.join(folder, name), size) for name, size in zip(names, table.values, strict=True))
    return [sizes[os.path.join(*os.path.split(path))] for path in paths]


def find_picture(key: str, image_dir: str | None, listings: dict[str, dict[str, str]]) -> str | None:
    """A metadata key's file: a path with or without ending, absolute or below image_dir (else the working folder)."""
    path = key if os.path.isabs(key) else os.path.join(image_dir or "", key)
    if os.path.isfile(path):
        return path
    folder, name = os.path.split(path)
    if folder not in listings:
        pictures = look_into(folder or ".").pictures if os.path.isdir(folder or ".") else []
        listings[folder] = {}
        for picture in pictures:
            listings[folder].setdefault(os.path.splitext(picture)[0], os.path.join(folder, picture))
    return listings[folder].get(name)


def combined_caption(entry: MetadataEntry, rules: CaptionRules) -> str:
    """Caption and tags of a metadata entry; with enable_wildcard the tags are added to every caption line."""
    lines = [line.strip() for line in (entry.caption or "").splitlines() if line.strip()]
    if not rules.enable_wildcard:
        lines = lines[:1]
    tags = (entry.tags or "").strip().replace("\n", rules.caption_separator)
    if tags:
        lines = [f"{line}{rules.caption_separator}{tags}" for line in lines] or [tags]
    return "\n".join(lines)


def few(paths: Iterable[str], limit: int = 5, count: int | None = None) -> str:
    """The first few of many, for messages; `count` says how many there are where `paths` has not all."""
    listed = paths if isinstance(paths, Sequence) else list(paths)
    count = len(listed) if count is None else count
    return ", ".join(listed[:limit]) + (f" and {count - limit} more" if count > limit else "")
