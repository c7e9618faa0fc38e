"""Listing of a folder by file names, without opening anything."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from library.base.errors import UserError, of_file
from library.data.description.image_extensions import OTHER_IMAGES, image_extensions
from library.data.sources.folders.image_index import FolderIndex, Stamps, compute_stamps

CAPTION_ENDINGS = ("txt", "caption", "cap", "tags")  # written by caption tools


@dataclass(frozen=True)
class Folder:
    """The files directly in a folder."""

    images: list[str]  # sorted
    dropped: list[tuple[str, str]]  # (path, reason) of entries that have an image's name but are no files
    captions: set[str]
    aside: list[str]  # other names with an image or caption extension
    stamps: Sequence[Stamps | None] = (None, None)  # of images and captions, if requested


def list_files(folder: str, caption_extension: str | None = None) -> Folder:
    """List a folder without opening anything in it."""
    files, others = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # Without following links, this usually needs no system call; only links and special entries are looked
                # up.
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                else:
                    others.append(entry)
    except OSError as error:
        raise make_listing_error(folder, error) from error
    contents = classify_names(files, caption_extension)
    for entry in others:
        add_link(contents, entry, caption_extension)
    contents.images.sort()
    contents.dropped.sort()
    return contents


def add_link(contents: Folder, entry: os.DirEntry[str], caption_extension: str | None) -> None:
    """Add the target of a link, or of another special entry, unless it is a folder."""
    classified = classify_names([entry.name], caption_extension)
    try:
        leads_to_file = entry.is_file()
        reason = "is a broken link" if entry.is_symlink() and not entry.is_dir() else None
    except OSError as error:
        leads_to_file, reason = bool(classified.captions), f"cannot be followed: {error.strerror}"
    if leads_to_file or (reason is not None and classified.aside):
        contents.images.extend(classified.images)
        contents.captions.update(classified.captions)  # reading it reports the reason if the link is broken
        contents.aside.extend(classified.aside)
    elif reason is not None and classified.images:
        contents.dropped.append((entry.path, reason))


def classify_names(names: Iterable[str], caption_extension: str | None) -> Folder:
    """Classify files by their extensions. Hidden files are left out, as in sd-scripts."""
    endings = {extension[1:] for extension in image_extensions()}
    similar = {extension.lower() for extension in (*endings, *OTHER_IMAGES, *CAPTION_ENDINGS)}
    folder = Folder([], [], set(), [])
    for name in names:
        # Such as ._cat.png and ._cat.txt, which macOS writes beside files on other file systems; they are no images.
        if name.startswith("."):
            continue
        ending = name.rpartition(".")[2]
        if ending in endings and "." in name:
            folder.images.append(name)
        elif caption_extension is not None and name.endswith(caption_extension):
            folder.captions.add(name)
        elif ending.lower() in similar and "." in name:
            folder.aside.append(name)
    return folder


def list_indexed_files(index: FolderIndex, caption_extension: str, num_threads: int) -> Folder | None:
    """Return the indexed files of a folder with their stamps, if it contains exactly these; else return None.

    This takes half the time of a new listing. The captions are left out; the stamps show which files were edited.
    """
    if caption_extension not in index.paired:
        return None
    images, captions = index.sizes, index.captions[caption_extension]
    indexed_names = {*images.names, *captions.names}
    try:
        listed = set(os.listdir(index.folder))
    except OSError as error:
        raise make_listing_error(index.folder, error) from error
    new_names = listed - indexed_names
    new_files = classify_names(new_names, caption_extension)
    if len(listed) - len(new_names) < len(indexed_names) or new_files.images or new_files.captions:
        return None
    stamps = (
        compute_stamps(index.folder, images.names, num_threads),
        compute_stamps(index.folder, captions.names, num_threads),
    )
    edited = [*images.edited(stamps[0]), *captions.edited(stamps[1])]
    # A file that became a folder or a broken link has another stamp, too.
    if not all(os.path.isfile(os.path.join(index.folder, name)) for name in edited):
        return None
    return Folder(images.names, [], set(), new_files.aside, stamps)


def make_listing_error(folder: str, error: OSError) -> UserError:
    return of_file(folder, cause="unreadable")(
        f"cannot be read: {error.strerror}", "change its permissions, or remove it"
    )
