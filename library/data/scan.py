"""From folders and metadata files to pictures: paths, captions, sizes. Nothing is decoded."""

import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

from library.data.buckets import Size
from library.data.captions import CaptionRules
from library.data.folder_cache import Fingerprint, FolderCache, fingerprint
from library.data.images import picture_extensions, read_size
from library.data.metadata_file import MetadataEntry, read_metadata
from library.data.schema import DatasetConfig, RunDataConfig, SubsetConfig

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a subset."""

    path: str
    caption: str  # as read: lines divided by newlines, without prefix, suffix and tag rules
    size: Size  # width, height, upright
    mask_path: str | None = None
    tags: str | None = None  # the tags field of a metadata file, for statistics


@dataclass(frozen=True)
class ScannedSubset:
    """What was found for a subset."""

    config: SubsetConfig
    pictures: tuple[Picture, ...]
    dropped: tuple[tuple[str, str], ...] = ()  # path, reason
    without_caption: tuple[str, ...] = ()
    empty_caption: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScannedDataset:
    """What was found for a dataset."""

    config: DatasetConfig
    subsets: tuple[ScannedSubset, ...]


@dataclass
class _Found:
    """A picture while its caption and size are read."""

    path: str
    caption: str = ""
    caption_path: str | None = None
    mask_path: str | None = None
    tags: str | None = None
    size: Size | None = None
    problem: str | None = None
    picture_print: Fingerprint | None = None
    caption_print: Fingerprint | None = None


@dataclass
class _Listing:
    """The pictures of a subset before their headers are read."""

    config: SubsetConfig
    found: list[_Found] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    empty_caption: list[str] = field(default_factory=list)


def collect(config: RunDataConfig, num_threads: int = 16) -> tuple[ScannedDataset, ...]:
    """List the pictures of every subset, read their captions and headers.

    Raises ValueError for missing folders and files, captions that are not UTF-8 and masks that are missing.
    """
    return tuple(collect_dataset(dataset, num_threads) for dataset in config.datasets)


def collect_dataset(config: DatasetConfig, num_threads: int) -> ScannedDataset:
    """The pictures of one dataset; a source that was named before in it is left out."""
    subsets, seen = [], set()
    for subset in config.subsets:
        source = os.path.normcase(os.path.abspath(subset.source))
        if source in seen:
            logger.warning("%s stands twice in one dataset; the second one is left out", subset.source)
            continue
        seen.add(source)
        subsets.append(collect_subset(subset, num_threads))
    return ScannedDataset(config, tuple(subsets))


def collect_subset(config: SubsetConfig, num_threads: int) -> ScannedSubset:
    """The pictures of one subset, in the order of their paths."""
    if config.style == "metadata":
        listing = list_metadata(config)
        cache = None
    else:
        cache = FolderCache.open(config) if config.cache_info else None
        listing = list_folder(config, cache, num_threads)
    if config.style == "masked":
        add_masks(listing)
    read_sizes(listing, num_threads)
    kept = []
    for found in listing.found:
        if found.size is None:
            listing.dropped.append((found.path, found.problem or "unknown"))
        else:
            kept.append(Picture(found.path, found.caption, found.size, found.mask_path, found.tags))
    if cache is not None:
        cache.write((f.path, f.caption, f.size, f.picture_print, f.caption_print) for f in listing.found if f.size)
    return ScannedSubset(
        config, tuple(kept), tuple(listing.dropped), tuple(listing.without_caption), tuple(listing.empty_caption)
    )


# Folders


def list_pictures(folder: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(paths of the pictures directly in the folder, sorted; what has a picture's name but is no file, with why)."""
    extensions = picture_extensions()
    paths, dropped = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(extensions):
                continue
            path = os.path.join(folder, entry.name)
            try:
                if entry.is_file():
                    paths.append(path)
                elif entry.is_symlink() and not entry.is_dir():
                    dropped.append((path, "is a link to nothing"))
            except OSError as error:
                dropped.append((path, f"cannot be followed: {error.strerror}"))
    return sorted(paths), sorted(dropped)


def list_folder(config: SubsetConfig, cache: FolderCache | None, num_threads: int) -> _Listing:
    """The pictures of image_dir with their captions."""
    folder = config.image_dir or ""
    listing = _Listing(config)
    if not os.path.isdir(folder):
        logger.warning("image_dir %s is not a folder", folder)
        return listing
    paths, listing.dropped = list_pictures(folder)
    listing.found = [_Found(path) for path in paths]

    def read(found: _Found) -> str | None:
        return read_caption(found, config, cache)

    for found, problem in zip(listing.found, in_threads(read, listing.found, num_threads, None), strict=True):
        if problem is not None:
            raise ValueError(problem)
        if found.caption_path is None:
            found.caption = config.class_tokens or ""
            listing.without_caption.append(found.path)
        elif not found.caption:
            listing.empty_caption.append(found.path)
    return listing


def read_caption(found: _Found, config: SubsetConfig, cache: FolderCache | None) -> str | None:
    """Fill in the caption of a picture; gives the sentence of a mistake."""
    stem = os.path.splitext(found.path)[0]
    candidates = [stem + config.caption_extension]
    name_parts = os.path.basename(stem).split("_")
    if len(name_parts) >= 5:  # face detection names its cuttings `..._cx_cy_w_h`
        candidates.append(os.path.join(os.path.dirname(stem), "_".join(name_parts[:-4])) + config.caption_extension)
    if cache is not None:
        found.picture_print = fingerprint(found.path)
        found.caption_path = next((path for path in candidates if os.path.isfile(path)), None)
        found.caption_print = fingerprint(found.caption_path) if found.caption_path else None
        known = cache.lookup(found.path, found.picture_print, found.caption_print)
        if known is not None:
            found.caption, found.size = known
            return None
    for path in candidates:
        try:
            with open(path, encoding="utf-8-sig") as file:
                found.caption = caption_text(file.readlines(), config.captions)
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            return f"the caption file {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        except OSError as error:
            return f"the caption file {path} cannot be read: {error.strerror}"
        found.caption_path = path
        return None
    return None


def caption_text(lines: Iterable[str], rules: CaptionRules) -> str:
    """The first line, or with enable_wildcard every line that is not blank; each stripped."""
    stripped = [line.strip() for line in lines]
    if rules.enable_wildcard:
        return "\n".join(line for line in stripped if line)
    return stripped[0] if stripped else ""


# Masks


def add_masks(listing: _Listing) -> None:
    """Find the mask of every picture; ValueError names those without one and masks without a picture."""
    folder = listing.config.conditioning_data_dir or ""
    if not os.path.isdir(folder):
        raise ValueError(f"conditioning_data_dir {folder} is not a folder")
    masks: dict[str, str] = {}
    for path in list_pictures(folder)[0]:
        masks.setdefault(os.path.splitext(os.path.basename(path))[0], path)
    stems = [os.path.splitext(os.path.basename(found.path))[0] for found in listing.found]
    missing = [found.path for found, stem in zip(listing.found, stems, strict=True) if stem not in masks]
    if missing:
        raise ValueError(f"{len(missing)} pictures have no mask in {folder}: {few(missing)}")
    surplus = [masks[stem] for stem in sorted(masks.keys() - set(stems))]
    if surplus:
        raise ValueError(
            f"{len(surplus)} masks in {folder} belong to no picture of {listing.config.image_dir}: {few(surplus)}"
        )
    for found, stem in zip(listing.found, stems, strict=True):
        found.mask_path = masks[stem]


# Metadata files


def list_metadata(config: SubsetConfig) -> _Listing:
    """The pictures that a metadata file names."""
    listing = _Listing(config)
    listings: dict[str, dict[str, str]] = {}
    for key, entry in read_metadata(config.metadata_file or ""):
        path = find_picture(key, config.image_dir, listings)
        if path is None:
            listing.dropped.append(
                (key, "there is no such picture" + (f" in {config.image_dir}" if config.image_dir else ""))
            )
            continue
        found = _Found(path, caption=combined_caption(entry, config.captions), tags=entry.tags)
        if entry.caption is None and entry.tags is None:
            listing.without_caption.append(path)
        elif not found.caption:
            listing.empty_caption.append(path)
        listing.found.append(found)
    return listing


def find_picture(key: str, image_dir: str | None, listings: dict[str, dict[str, str]]) -> str | None:
    """A metadata key's file: a path with or without ending, absolute or below image_dir (else the working folder)."""
    path = key if os.path.isabs(key) else os.path.join(image_dir or "", key)
    if os.path.isfile(path):
        return path
    folder, name = os.path.split(path)
    if folder not in listings:
        found = list_pictures(folder or ".")[0] if os.path.isdir(folder or ".") else []
        listings[folder] = {}
        for picture in found:
            listings[folder].setdefault(
                os.path.splitext(os.path.basename(picture))[0], os.path.join(folder, os.path.basename(picture))
            )
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


# Sizes


def read_sizes(listing: _Listing, num_threads: int) -> None:
    """Fill in sizes from the headers; what cannot be read gets a reason."""

    def read(found: _Found) -> None:
        try:
            found.size = read_size(found.path)
        except (ValueError, OSError) as error:
            found.problem = str(error).removeprefix(found.path).strip()

    unknown = [found for found in listing.found if found.size is None]
    in_threads(read, unknown, num_threads, f"reading sizes of {listing.config.base_name}")


def in_threads(
    function: Callable[[Item], Value], items: list[Item], num_threads: int, title: str | None
) -> list[Value]:
    """The function's value for every item, in order; with a title a bar is shown."""
    with ThreadPoolExecutor(num_threads) as pool:
        values = pool.map(function, items, chunksize=1)
        return list(tqdm(values, desc=title, total=len(items), disable=title is None, leave=False, smoothing=0))


def few(paths: Iterable[str], limit: int = 5) -> str:
    """The first few of many, for messages."""
    listed = list(paths)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
