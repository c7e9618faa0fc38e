"""What lies in a folder, by the names of files. Nothing is opened."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from library.data.description.image_extensions import image_extensions
from library.data.sources.folders.image_index import (
    FolderIndex,
    Stamps,
    look_at,
)
from library.errors import UserError

OTHER_PICTURES = frozenset(("gif", "tif", "tiff", "heic", "heif", "avif", "jxl", "tga", "psd"))
CAPTION_ENDINGS = ("txt", "caption", "cap", "tags")  # that tools for captions write


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
    endings = {extension[1:] for extension in image_extensions()}
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
    return UserError(f"{folder} cannot be read: {error.strerror}; change its permissions, or leave it out")
