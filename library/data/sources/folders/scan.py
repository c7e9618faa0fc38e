"""Listing of the images in folders: paths, captions, sizes. No pixels are decoded."""

import logging
import os
from collections.abc import Collection, Sequence

from library.data.description.schema import SubsetConfig, explain_missing_folder
from library.data.scanned.columns import Texts
from library.data.scanned.subsets import Listing
from library.data.sources.folders.image_index import FolderIndex, Table, list_own_captions, open_index, update_table
from library.data.sources.folders.listing import Folder, list_files, list_indexed_files
from library.data.sources.folders.reading import check_encodings, parse_captions, read_caption, read_image_size
from library.data.sources.storage.index_places import IndexPlaces
from library.options.config_file import BACKSLASH_HINT
from library.options.encodings import NotUtf8

logger = logging.getLogger(__name__)


def list_folder(config: SubsetConfig, places: IndexPlaces, num_threads: int) -> Listing:
    """List the images of image_dir with their captions and sizes, using the folder's index while it is valid."""
    folder = config.image_dir or ""
    listing = Listing(config)
    if not os.path.isdir(folder):
        escaped = any(character < " " for character in folder)  # "C:\\train" in TOML contains a tab
        problem = f"{folder!r} is not a folder: {BACKSLASH_HINT}" if escaped else explain_missing_folder(folder)
        logger.warning("image_dir %s", problem)
        return listing
    index = open_index(folder, places)
    files: Sequence[str | None]
    if contents := list_indexed_files(index, config.caption_extension, num_threads):
        files = index.captions[config.caption_extension].names
    else:
        contents = list_files(folder, config.caption_extension)
        files = caption_files(folder, contents, config.caption_extension)
    listing.names, listing.dropped, listing.aside = contents.images, contents.dropped, contents.aside
    listing.alone = sorted(lone_captions(contents.captions, files))
    try:
        texts = read_with_index(listing, index, contents, files, num_threads)
    except NotUtf8:
        # The error names one file; this raises one error for all of them.
        check_encodings(folder, (file for file in files if file is not None))
        raise
    listing.captions = parse_captions(texts, config.captions)
    if None in files or not listing.captions.lengths.all():
        note_missing(listing, files)
    return listing


def lone_captions(captions: Collection[str], files: Sequence[str | None]) -> set[str]:
    """Return the captions that belong to no image. Captions that the file system finds under a name in other case
    belong to one."""
    in_other_case = {file.casefold() for file in files if file is not None and file not in captions}
    return {name for name in set(captions).difference(files) if name.casefold() not in in_other_case}


def note_missing(listing: Listing, files: Sequence[str | None]) -> None:
    """Use class_tokens for images without a caption file, and record missing and empty captions."""
    captions = list(listing.captions)
    for index, (path, file) in enumerate(zip(listing.paths, files, strict=True)):
        if file is None:
            captions[index] = listing.config.class_tokens or ""
            listing.without_caption.append(path)
        elif not captions[index]:
            listing.empty_caption.append(path)
    listing.captions = Texts.of(captions)


def caption_files(folder: str, contents: Folder, extension: str) -> Sequence[str | None]:
    """Return the name of each image's caption file, or None."""
    own_names = list_own_captions(contents.images, extension)
    if contents.captions.issuperset(own_names):
        return own_names
    return [
        name if name in contents.captions else find_other_caption_file(folder, name, extension) for name in own_names
    ]


def find_other_caption_file(folder: str, own_name: str, extension: str) -> str | None:
    """Return the caption file of an image whose own file is not listed: a name in other case, or that of the image
    that a face was cropped from."""
    names, stem = [own_name], own_name.removesuffix(extension)  # the file system may find names in other case
    if stem.count("_") >= 4:  # face detection names its crops `..._cx_cy_w_h`
        names.append(stem.rsplit("_", 4)[0] + extension)
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)


def read_with_index(
    listing: Listing, index: FolderIndex, contents: Folder, files: Sequence[str | None], num_threads: int
) -> Sequence[str]:
    """Set the sizes, and return the text of each image's caption file. Both come from the index, or from files that
    it lacks."""
    config, folder = listing.config, index.folder
    # Images can share a caption file: crops of faces, and names that differ only in the extension.
    names = list(dict.fromkeys(file for file in files if file is not None))
    known_captions = index.captions.get(config.caption_extension, Table())
    captions = update_table(known_captions, folder, names, read_caption, num_threads, None, contents.stamps[1])
    title = f"reading sizes of {config.base_name}"
    sizes = update_table(index.sizes, folder, contents.images, read_image_size, num_threads, title, contents.stamps[0])
    index.replace_with(sizes, index.captions | {config.caption_extension: captions})
    listing.sizes = sizes.values
    if len(names) == len(files):
        return captions.values
    texts: dict[str | None, str] = dict(zip(names, captions.values, strict=True))
    return [texts.get(file, "") for file in files]
