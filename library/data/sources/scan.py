"""From folders and metadata files to pictures: paths, captions, sizes. Nothing is decoded."""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from library.data.batches.images import picture_extensions, read_size
from library.data.batches.threads import in_blocks
from library.data.description.buckets import Size
from library.data.description.captions import CaptionRules
from library.data.description.schema import DatasetConfig, SubsetConfig
from library.data.sources.columns import Sizes, Texts
from library.data.sources.folder_cache import CacheRow, FolderCache, fingerprint
from library.data.sources.image_headers import HEAD_BYTES, plain_size
from library.data.sources.metadata_file import MetadataEntry, read_metadata
from library.data.sources.picture_index import (
    UNSETTLED,
    FolderIndex,
    Stamps,
    Table,
    look_at,
    open_index,
    own_captions,
    read_stamped,
    renewed,
    stamp_of,
)
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
    names: list[str] = field(default_factory=list)
    captions: Texts = field(default_factory=Texts.of)
    sizes: Sequence[Size | str] = ()  # of a picture that cannot be read: why
    masks: list[str] | None = None
    tags: list[str] | None = None
    dropped: list[tuple[str, str]] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    empty_caption: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """What stands before a name in the path of a picture."""
        return "" if self.config.style == "metadata" else os.path.join(self.config.image_dir or "", "")

    @property
    def paths(self) -> list[str]:
        """The path of each picture."""
        return [self.prefix + name for name in self.names]

    def found(self) -> ScannedSubset:
        """The pictures with a size, as columns that need no object for each."""
        masks, tags = (None if texts is None else Texts.of(texts) for texts in (self.masks, self.tags))
        if isinstance(self.sizes, Sizes):  # as an index has them
            sizes, dropped = self.sizes, []
        else:
            sizes = Sizes.of([(0, 0) if isinstance(size, str) else size for size in self.sizes])
            whys = zip(self.names, self.sizes, strict=True)
            dropped = [(self.prefix + name, why) for name, why in whys if isinstance(why, str)]
        pictures = Pictures(Texts.of(self.names), self.captions, sizes.array_N2, self.prefix, masks, tags)
        if dropped:
            pictures = pictures.take(np.flatnonzero(sizes.array_N2.any(axis=1)))
        return ScannedSubset(
            self.config,
            pictures,
            (*self.dropped, *dropped),
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
    stamps: Sequence[Stamps | None] = (None, None)  # of pictures and captions, where they were asked for


def look_into(folder: str, caption_extension: str | None = None) -> Folder:
    """List a folder without opening anything in it."""
    files, others = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                else:
                    others.append(entry)
    except OSError as error:
        raise not_listed(folder, error) from error
    found = told_apart(files, caption_extension)
    for entry in others:
        add_link(found, entry, caption_extension)
    found.pictures.sort()
    found.dropped.sort()
    return found


def add_link(found: Folder, entry: os.DirEntry[str], caption_extension: str | None) -> None:
    """Add what a link leads to; nothing for a folder."""
    named = told_apart([entry.name], caption_extension)
    try:
        leads_to_file = entry.is_file()
        reason = "is a link to nothing" if entry.is_symlink() and not entry.is_dir() else None
    except OSError as error:
        leads_to_file, reason = bool(named.captions), f"cannot be followed: {error.strerror}"
    if leads_to_file or named.aside:
        found.pictures.extend(named.pictures)
        found.captions.update(named.captions)  # of one that cannot be followed whoever reads it learns why not
        found.aside.extend(named.aside)
    elif reason is not None and named.pictures:
        found.dropped.append((entry.path, reason))


def told_apart(names: Iterable[str], caption_extension: str | None) -> Folder:
    """What the names of files say they are."""
    endings = {extension[1:] for extension in picture_extensions()}
    similar = {extension.lower() for extension in (*endings, *OTHER_PICTURES, *CAPTION_ENDINGS)}
    told = Folder([], [], set(), [])
    for name in names:
        ending = name.rpartition(".")[2]
        if ending in endings and "." in name:
            told.pictures.append(name)
        elif caption_extension is not None and name.endswith(caption_extension):
            told.captions.add(name)
        elif ending.lower() in similar and "." in name:
            told.aside.append(name)
    return told


def look_again(index: FolderIndex, caption_extension: str, num_threads: int) -> Folder | None:
    """The same, without its captions but with stamps, where a folder has the files that the index knows and no others.

    It takes half of the time. What was edited is a matter of the stamps.
    """
    if caption_extension not in index.paired:
        return None
    pictures, captions = index.sizes, index.captions[caption_extension]
    known = {*pictures.names, *captions.names}
    try:
        listed = set(os.listdir(index.folder))
    except OSError as error:
        raise not_listed(index.folder, error) from error
    others = listed - known
    rest = told_apart(others, caption_extension)
    if len(listed) - len(others) < len(known) or rest.pictures or rest.captions:
        return None
    stamps = look_at(index.folder, pictures.names, num_threads), look_at(index.folder, captions.names, num_threads)
    edited = [*pictures.edited(stamps[0]), *captions.edited(stamps[1])]
    if not all(os.path.isfile(os.path.join(index.folder, name)) for name in edited):
        return None
    return Folder(pictures.names, [], set(), rest.aside, stamps)


def not_listed(folder: str, error: OSError) -> UserError:
    """The error for a folder that cannot be listed."""
    return UserError(f"{folder} cannot be read: {error.strerror}; change its rights, or leave it out")


def list_folder(config: SubsetConfig, num_threads: int) -> _Listing:
    """The pictures of image_dir with their captions and sizes, from the folder's index where that is still true."""
    folder = config.image_dir or ""
    listing = _Listing(config)
    if not os.path.isdir(folder):
        escaped = any(character < " " for character in folder)  # "C:\\train" in TOML has a tab in it
        hint = f": {BACKSLASH_HINT}" if escaped else ""
        logger.warning("image_dir %s is not a folder%s", repr(folder) if escaped else folder, hint)
        return listing
    index = FolderIndex(folder) if config.cache_info else open_index(folder)
    files: Sequence[str | None]
    if inside := look_again(index, config.caption_extension, num_threads):
        files = index.captions[config.caption_extension].names
    else:
        inside = look_into(folder, config.caption_extension)
        files = caption_files(folder, inside, config.caption_extension)
    listing.names, listing.dropped, listing.aside = inside.pictures, inside.dropped, inside.aside
    listing.alone = sorted(inside.captions.difference(files))
    try:
        if config.cache_info:
            texts = read_with_cache(listing, files, num_threads)
        else:
            texts = read_with_index(listing, index, inside, files, num_threads)
    except NotUtf8:
        check_encodings(folder, (file for file in files if file is not None))
        raise
    listing.captions = captions_of(texts, config.captions)
    if None in files or not listing.captions.lengths.all():
        note_missing(listing, files)
    return listing


def captions_of(texts: Sequence[str], rules: CaptionRules) -> Texts:
    """The column of captions in the texts of files."""
    if isinstance(texts, Texts) and not texts.has_lines:
        return texts
    return Texts.of(caption_of(text, rules) for text in texts)


def note_missing(listing: _Listing, files: Sequence[str | None]) -> None:
    """Put class_tokens in the place of captions without a file, and list what is missing or empty."""
    captions = list(listing.captions)
    for place, (path, file) in enumerate(zip(listing.paths, files, strict=True)):
        if file is None:
            captions[place] = listing.config.class_tokens or ""
            listing.without_caption.append(path)
        elif not captions[place]:
            listing.empty_caption.append(path)
    listing.captions = Texts.of(captions)


def caption_files(folder: str, inside: Folder, extension: str) -> Sequence[str | None]:
    """The name of each picture's caption file; None where there is none."""
    own = own_captions(inside.pictures, extension)
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
    listing: _Listing, index: FolderIndex, inside: Folder, files: Sequence[str | None], num_threads: int
) -> Sequence[str]:
    """Fill in sizes and give the text of each picture's caption file, from the index of the folder and the files."""
    config, folder = listing.config, index.folder
    names = list(dict.fromkeys(file for file in files if file is not None))
    known_captions = index.captions.get(config.caption_extension, Table())
    captions = renewed(known_captions, folder, names, read_caption, num_threads, None, inside.stamps[1])
    title = f"reading sizes of {config.base_name}"
    sizes = renewed(index.sizes, folder, inside.pictures, size_of, num_threads, title, inside.stamps[0])
    if config.keeps_index:
        index.replace_with(sizes, index.captions | {config.caption_extension: captions})
    listing.sizes = sizes.values
    if len(names) == len(files):
        return captions.values
    texts: dict[str | None, str] = dict(zip(names, captions.values, strict=True))
    return [texts.get(file, "") for file in files]


def read_with_cache(listing: _Listing, files: Sequence[str | None], num_threads: int) -> Sequence[str]:
    """The same from sd-scripts' metadata_cache.json, which is written anew."""
    config, paths = listing.config, listing.paths
    cache = FolderCache.open(config)

    def read(block: Sequence[int]) -> list[CacheRow]:
        return [cached_or_read(cache, config, paths[place], files[place]) for place in block]

    rows = in_blocks(read, range(len(paths)), num_threads, f"reading sizes of {config.base_name}")
    if config.keeps_index:
        cache.write(row for row in rows if not isinstance(row[2], str))
    listing.sizes = [row[2] for row in rows]
    return [row[1] for row in rows]


def cached_or_read(cache: FolderCache, config: SubsetConfig, path: str, file: str | None) -> CacheRow:
    """Path, caption, size and what both were read from, of one picture and its caption file."""
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
    captions: list[str] = []
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
        listing.names.append(path)
        captions.append(caption)
        tags.append(entry.tags or "")
    listing.captions, listing.tags = Texts.of(captions), tags
    listing.sizes = sizes_anywhere(
        listing.names, num_threads, f"reading sizes of {config.base_name}", config.keeps_index
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
        index = open_index(folder or ".")
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
