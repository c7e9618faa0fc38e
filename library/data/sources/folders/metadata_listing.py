"""Listing of the images in metadata files: paths, captions, sizes."""

import os

from library.base.errors import about, list_few
from library.data.description.captions import CaptionRules
from library.data.description.schema import SubsetConfig
from library.data.scanned.columns import Texts
from library.data.scanned.subsets import Listing
from library.data.sources.folders.listing import list_files
from library.data.sources.folders.metadata_file import MetadataEntry, read_metadata
from library.data.sources.folders.pairing import add_reference_paths
from library.data.sources.folders.reading import sizes_anywhere
from library.data.sources.storage.index_places import IndexPlaces


def list_metadata(config: SubsetConfig, places: IndexPlaces, num_threads: int) -> Listing:
    """List the images of a metadata file. Raises UserError for missing or conflicting reference images."""
    listing = Listing(config)
    listings: dict[str, dict[str, str]] = {}
    captions: list[str] = []
    tags: list[str] = []
    references: list[tuple[str, ...]] = []
    missing: list[str] = []
    for key, entry in read_metadata(config.metadata_file or "") if config.entries is None else config.entries:
        path = find_image(key, config.image_dir, listings)
        if path is None:
            listing.dropped.append(
                (key, "there is no such image" + (f" in {config.image_dir}" if config.image_dir else ""))
            )
            continue
        caption = combine_caption(entry, config.captions)
        if entry.caption is None and entry.tags is None:
            listing.without_caption.append(path)
        elif not caption:
            listing.empty_caption.append(path)
        listing.names.append(path)
        captions.append(caption)
        tags.append(entry.tags or "")
        reference_files = [
            (reference, find_image(reference, config.image_dir, listings)) for reference in entry.references
        ]
        missing += [reference for reference, file in reference_files if file is None]
        references.append(tuple(file for _, file in reference_files if file is not None))
    listing.captions, listing.tags = Texts.of(captions), tags
    listing.sizes = sizes_anywhere(listing.names, places, num_threads, f"reading sizes of {config.base_name}")
    if missing:
        raise about("metadata_file")(
            f"{config.metadata_file}: there are no such reference images: {list_few(missing)}",
            "correct their control_path, which is relative to image_dir or to the working folder",
        )
    if any(references):
        if config.control_dirs or config.opposite_dir:
            raise about("metadata_file")(
                f"{config.metadata_file} names reference images with control_path, and the subset has "
                f"{'control_dirs' if config.control_dirs else 'opposite_dir'}",
                "keep one of them",
            )
        add_reference_paths(listing, references, places, num_threads)
    return listing


def find_image(key: str, image_dir: str | None, listings: dict[str, dict[str, str]]) -> str | None:
    """Find the file of a metadata key: a path with or without extension; absolute, relative to image_dir, or
    relative to the working folder."""
    path = key if os.path.isabs(key) else os.path.join(image_dir or "", key)
    for candidate in (path, key):  # `full_path` of sd-scripts' tools writes paths as typed
        if os.path.isfile(candidate):
            return candidate
    folder, name = os.path.split(path)
    if folder not in listings:
        images = list_files(folder or ".").images if os.path.isdir(folder or ".") else []
        listings[folder] = {}
        for image in images:
            listings[folder].setdefault(os.path.splitext(image)[0], os.path.join(folder, image))
    return listings[folder].get(name)


def combine_caption(entry: MetadataEntry, rules: CaptionRules) -> str:
    """Combine caption and tags of an entry.

    The tags are added to every line with enable_wildcard, and to the whole caption with enable_multiline_caption.
    """
    lines = [line.strip() for line in (entry.caption or "").splitlines() if line.strip()]
    if rules.enable_multiline_caption:
        lines = ["\n".join(lines)] if lines else []
    elif not rules.enable_wildcard:
        lines = lines[:1]
    tags = (entry.tags or "").strip().replace("\n", rules.caption_separator)
    if tags:
        # As in sd-scripts, no space is added after the separator.
        lines = [f"{line}{rules.caption_separator}{tags}" for line in lines] or [tags]
    return "\n".join(lines)
