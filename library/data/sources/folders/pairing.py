"""Images in other folders that are matched to a subset's images by name: masks and reference images."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from library.base.errors import UserError, about, error_in, list_few
from library.base.formatting import format_count
from library.data.description.buckets import Size
from library.data.description.image_extensions import describe_unread
from library.data.scanned.subsets import Listing
from library.data.sources.folders.listing import list_files
from library.data.sources.folders.reading import sizes_anywhere
from library.data.sources.storage.index_places import IndexPlaces

NUMBERED = re.compile(r"(.+)_(\d+)")  # stem of one of several references


def names_by_stem(key: str, folder: str) -> dict[str, list[str]]:
    """Return the images of a folder by name without extension. Raises UserError naming `key` if the folder does not
    exist."""
    if not os.path.isdir(folder):
        raise about(key)(f"{folder} is not a folder", "correct the path, or create it")
    names: dict[str, list[str]] = defaultdict(list)
    for name in list_files(folder).images:
        names[os.path.splitext(name)[0]].append(name)
    return names


def unread_in(folder: str) -> str:
    """Return a remark on the images of a folder that are not read, or ""."""
    return describe_unread(list_files(folder).aside)


def list_stems(listing: Listing) -> list[str]:
    """Return the file name of each image without extension."""
    return [os.path.splitext(os.path.basename(path))[0] for path in listing.paths]


def add_masks(listing: Listing) -> None:
    """Add the mask of every image. Raises UserError for images without a mask and masks without an image."""
    folder = listing.config.conditioning_data_dir or ""
    mask_names = names_by_stem("conditioning_data_dir", folder)
    masks = {stem: os.path.join(folder, names[0]) for stem, names in mask_names.items()}
    stems = list_stems(listing)
    missing = [path for path, stem in zip(listing.paths, stems, strict=True) if stem not in masks]
    if missing:
        raise error_in(path=folder)(
            f"{format_count(len(missing), 'image')} without a mask in {folder}: {list_few(missing)}{unread_in(folder)}"
        )
    surplus = [masks[stem] for stem in sorted(masks.keys() - set(stems))]
    if surplus:
        raise error_in(path=folder)(
            f"{len(surplus)} masks in {folder} belong to no image in {listing.config.image_dir}: {list_few(surplus)}"
        )
    listing.masks = [masks[stem] for stem in stems]


def add_references(listing: Listing, places: IndexPlaces, num_threads: int) -> None:
    """Add the reference images of every image in `control_dirs`, or its partner in `opposite_dir`, with their sizes.

    In each folder of `control_dirs`, an image has one reference of its own name, or several named <name>_0, <name>_1
    and so on. Raises UserError for images without a reference or with ambiguous ones, and for references that cannot be
    read.
    """
    config, stems = listing.config, list_stems(listing)
    if config.control_dirs:
        of_folders = [references_in(folder, listing.paths, stems, listing.surplus) for folder in config.control_dirs]
        add_reference_paths(listing, [sum(row, ()) for row in zip(*of_folders, strict=True)], places, num_threads)
    elif config.opposite_dir:
        opposites = opposites_in(config.opposite_dir, listing.paths, stems, listing.surplus)
        add_reference_paths(listing, [(path,) for path in opposites], places, num_threads)


def add_reference_paths(
    listing: Listing, paths: Sequence[tuple[str, ...]], places: IndexPlaces, num_threads: int
) -> None:
    """Set the references of each image, and read their sizes. Raises UserError for references that cannot be read."""
    config = listing.config
    word = "partner" if config.opposite_dir else "reference image"
    all_paths = [path for row in paths for path in row]
    sizes = sizes_anywhere(all_paths, places, num_threads, f"reading sizes of {config.base_name}'s {word}s")
    size_or_reason: dict[str, Size | str] = dict(zip(all_paths, sizes, strict=True))
    broken = [f"{path} {size}" for path, size in size_or_reason.items() if isinstance(size, str)]
    if broken:
        raise UserError(
            f"{format_count(len(broken), word)} cannot be read: {list_few(broken)}",
            "re-save them, or remove them together with their images",
        )
    size_by_path = {path: size for path, size in size_or_reason.items() if not isinstance(size, str)}
    listing.references = [[(path, size_by_path[path]) for path in row] for row in paths]


def opposites_in(folder: str, paths: Sequence[str], stems: Sequence[str], surplus: list[str]) -> list[str]:
    """Return the partner of each image in `opposite_dir`. Images without a counterpart are added to `surplus`."""
    partners = names_by_stem("opposite_dir", folder)
    unclear = [path for path, stem in zip(paths, stems, strict=True) if len(partners.get(stem, ())) != 1]
    if unclear:
        raise about("opposite_dir")(
            f"{folder}: {len(unclear)} of {len(paths)} images do not have exactly one partner of their name there: "
            f"{list_few(unclear)}",
            f"add or remove images{unread_in(folder)}",
        )
    surplus += [os.path.join(folder, name) for stem in sorted(partners.keys() - set(stems)) for name in partners[stem]]
    return [os.path.join(folder, partners[stem][0]) for stem in stems]


def references_in(folder: str, paths: Sequence[str], stems: Sequence[str], surplus: list[str]) -> list[tuple[str, ...]]:
    """Return each image's references in a folder, in order. References of no image are added to `surplus`."""
    candidates = names_by_stem("control_dirs", folder)
    matches, surplus_names = matches_by_stem(candidates, set(stems))
    surplus += [os.path.join(folder, name) for name in surplus_names]
    missing = [path for path, stem in zip(paths, stems, strict=True) if stem not in matches]
    if missing:
        raise about("control_dirs")(
            f"{folder}: {len(missing)} of {len(paths)} images have no reference image there: "
            f"{list_few(missing)}; add images of the same names, or train these images in a subset without control_dirs"
            + unread_in(folder)
        )
    unclear = [f"{stem} ({', '.join(names)})" for stem, names in matches.items() if not is_in_order(stem, names)]
    if unclear:
        raise about("control_dirs")(
            f"{folder}: {format_count(len(unclear), 'image')} with ambiguous reference images: {list_few(unclear)}",
            "keep one of the image's own name, or several numbered _0, _1 and so on without a gap",
        )
    return [tuple(os.path.join(folder, name) for name in matches[stem]) for stem in stems]


def matches_by_stem(candidates: dict[str, list[str]], stems: set[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return (the references of each image by stem, in order of their numbers; references that belong to no image)."""
    matches: dict[str, list[str]] = defaultdict(list)
    surplus: list[str] = []
    # Shorter names first, so that _2 precedes _10.
    for stem, names in sorted(candidates.items(), key=lambda item: (len(item[0]), item[0])):
        numbered = NUMBERED.fullmatch(stem)
        if stem in stems:  # even if the stem itself ends in a number
            matches[stem] += names
        elif numbered is not None and numbered[1] in stems:
            matches[numbered[1]] += names
        else:
            surplus += names
    return matches, surplus


def is_in_order(stem: str, names: Iterable[str]) -> bool:
    """Return True if there is a single reference of the image's own name, or if they are numbered without a gap."""
    numbers = [os.path.splitext(name)[0].removeprefix(stem).removeprefix("_") for name in names]
    if numbers == [""]:
        return True
    if "" in numbers:
        return False
    return [int(number) for number in numbers] == list(range(int(numbers[0]), int(numbers[0]) + len(numbers)))
