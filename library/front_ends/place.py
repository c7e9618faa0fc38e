"""Installs files into a folder of a front end, and restores it.

Every step can be repeated: the journal says what is ours, each file is moved to its place at once, and nothing is
deleted but unchanged files of the journal. Whatever else is in the way is moved aside.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from library.base.errors import of_file
from library.front_ends.git_files import follow_branch, hide_kept, list_committed, show_kept
from library.front_ends.journal import (
    DISPLACING,
    INSTALLED,
    REMOVING,
    RETURNING,
    WRITING,
    Journal,
    Place,
    digest_file,
    discard_begun_journal,
    read_journal,
    write_journal,
)
from library.front_ends.submodule import Submodule, block_updates, read_head, read_update, restore_head, unblock_updates

logger = logging.getLogger(__name__)

# LoRA_Easy keeps its environment in the scripts' folder, whose files contain their own path. Without .git, git takes
# the folder for an empty one and fills it by force.
STAYING = (".git", "venv", ".venv")

Digests = Mapping[str, Sequence[str]]
Content = Path | bytes
"""A file of this suite, or text made for the front end."""


def install(
    place: Place, contents: Mapping[str, Content], version: str, is_whole: bool, submodule: Submodule | None
) -> bool:
    """Install `contents` (path in the folder -> content), or update what is installed. Return True if it was an update.

    `is_whole` moves everything else of the folder away, otherwise only files of these names. Git no longer updates
    `submodule`, which is or contains the folder. Raises UserError if files of these names beside the folder are not
    of this tool.
    """
    digests = {path: [digest_content(content)] for path, content in contents.items()}
    journal = read_journal(place)
    check_original(place, journal, submodule)
    if journal is not None and journal.phase in (REMOVING, RETURNING):  # an interrupted --restore
        restore(place, submodule)
        journal = None
    is_update = journal is not None and journal.phase != DISPLACING
    if journal is None:
        journal = begin_journal(place, digests, version, is_whole)
    # Until an update is complete, the files of both versions are ours.
    journal = replace(journal, files=merge_digests(journal.files, digests))
    if submodule is not None and not journal.is_submodule:
        journal = replace(journal, is_submodule=True, earlier_update=read_update(submodule))
    write_journal(place, journal)
    hide_kept(place)
    if submodule is not None:
        block_updates(submodule)
    if journal.phase == DISPLACING:
        displace(place, journal)
    elif is_whole:
        remove_committed(place, journal)
    journal = replace(journal, phase=WRITING)
    write_journal(place, journal)
    for path in journal.files.keys() - contents.keys():
        # The modules of some folders are choices of an option, so an old one would still be offered.
        remove_or_set_aside(place, path, journal)
    remove_empty_folders(place, journal)
    for path, content in contents.items():
        put(place, path, content, journal)
    write_journal(place, replace(journal, phase=INSTALLED, files=digests, version=version))
    return is_update


def restore(place: Place, submodule: Submodule | None) -> None:
    """Remove what is installed, and put the front end's own files back.

    Raises UserError if nothing is installed.
    """
    journal = read_journal(place)
    if journal is None:
        discard_begun_journal(place)
        raise of_file(place.journal, cause="missing")(f"is missing, so nothing was installed into {place.folder}")
    check_original(place, journal, submodule)
    if journal.phase not in (DISPLACING, RETURNING):
        write_journal(place, replace(journal, phase=REMOVING))
        remove_ours(place, journal)
    # From here on nothing is removed: a file of the original may be equal to one of ours.
    write_journal(place, replace(journal, phase=RETURNING))
    place.folder.mkdir(exist_ok=True)
    if place.original.is_dir():
        for path in sorted(place.original.iterdir()):
            if os.path.lexists(place.folder / path.name):
                set_aside(place, path.name)
            os.rename(path, place.folder / path.name)
        os.rmdir(place.original)
    if journal.head is not None:
        restore_head(place.folder, journal.head)
        if not follow_branch(place.folder, journal.head):
            logger.warning("%s keeps files of an earlier commit, because you changed some of them", place.folder)
    if submodule is not None and journal.is_submodule:
        unblock_updates(submodule, journal.earlier_update)
    show_kept(place)
    place.part.unlink(missing_ok=True)
    os.unlink(place.journal)


def check_original(place: Place, journal: Journal | None, submodule: Submodule | None) -> None:
    """Raise UserError if the front end's own files were taken from where they are kept."""
    if journal is None or journal.phase in (DISPLACING, RETURNING) or not journal.displaced or place.original.is_dir():
        return
    unset = "" if submodule is None else f" and run `git -C {submodule.repository} config --unset {submodule.setting}`"
    raise of_file(place.original, cause="missing")(
        f"with the front end's own files is missing. If you have put them back into {place.folder}, "
        f"delete {place.journal}{unset}; else put the folder back"
    )


def begin_journal(place: Place, digests: Digests, version: str, is_whole: bool) -> Journal:
    """Return the journal of a first installation."""
    entries = sorted(os.listdir(place.folder))
    displaced = [name for name in entries if (name not in STAYING if is_whole else name in digests)]
    head = read_head(place.folder) if is_whole else None
    return Journal(version, DISPLACING, is_whole, displaced, digests, head)


def merge_digests(old: Digests, new: Digests) -> Digests:
    """Return the digests of both versions of each file."""
    return {path: sorted({*old.get(path, ()), *new.get(path, ())}) for path in {**old, **new}}


def displace(place: Place, journal: Journal) -> None:
    """Move the front end's own files away. An entry that is there again after an interruption stays for `put`."""
    if journal.displaced:
        place.original.mkdir(exist_ok=True)
    for name in journal.displaced:
        if os.path.lexists(place.folder / name) and not os.path.lexists(place.original / name):
            os.rename(place.folder / name, place.original / name)


def digest_content(content: Content) -> str:
    return sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()


def put(place: Place, path: str, content: Content, journal: Journal) -> None:
    """Write a file unless it is there already; what is in its way is moved aside."""
    target = place.folder / path
    if digest_file(target) == digest_content(content):
        return
    for parent in reversed(PurePosixPath(path).parents[:-1]):
        if (place.folder / parent).is_symlink() or (place.folder / parent).is_file():
            set_aside(place, str(parent))
    if os.path.lexists(target) and digest_file(target) not in journal.files[path]:
        set_aside(place, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        with open(place.part, "wb") as file:
            file.write(content)
    else:
        shutil.copyfile(content, place.part)
        shutil.copymode(content, place.part)
    os.replace(place.part, target)


def remove_ours(place: Place, journal: Journal) -> None:
    """Remove the installed files, their caches and their empty folders. Move everything else that was not there before
    the installation aside."""
    if journal.is_whole:
        remove_committed(place, journal)
    for path in journal.files:
        remove_or_set_aside(place, path, journal)
    remove_empty_folders(place, journal)
    if journal.is_whole and place.folder.is_dir():
        for name in sorted(os.listdir(place.folder)):
            if name not in STAYING:
                set_aside(place, name)


def remove_committed(place: Place, journal: Journal) -> None:
    """Delete what git brought back since the installation, such as by `git checkout .` and a pull: unchanged files of
    its commit, which are nobody's."""
    for path in list_committed(place.folder):
        if digest_file(place.folder / path) not in journal.files.get(path, ()):
            os.unlink(place.folder / path)
            remove_empty_parents(place.folder, place.folder / path)


def remove_or_set_aside(place: Place, path: str, journal: Journal) -> None:
    """Delete a file of ours if it is unchanged, with its compiled copies."""
    target = place.folder / path
    if digest_file(target) in journal.files[path]:
        os.unlink(target)
    elif os.path.lexists(target):
        set_aside(place, path)
    if target.suffix == ".py":
        for cached in sorted((target.parent / "__pycache__").glob(f"{target.stem}.*.pyc")):
            os.unlink(cached)


def remove_empty_folders(place: Place, journal: Journal) -> None:
    """Delete the empty folders among those of the journal's files."""
    folders = {parent for path in journal.files for parent in PurePosixPath(path).parents}
    folders |= {folder / "__pycache__" for folder in folders}
    for folder in sorted(folders - {PurePosixPath(".")}, key=lambda folder: (-len(folder.parts), folder)):
        path = place.folder / folder
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            os.rmdir(path)


def remove_empty_parents(top: Path, path: Path) -> None:
    """Delete the folders of a file that was deleted, up to `top`, as far as they are empty."""
    for folder in path.parents:
        if folder == top or any(folder.iterdir()):
            return
        os.rmdir(folder)


def set_aside(place: Place, path: str) -> None:
    """Move a file or folder that is not ours out of the way, and name it."""
    if place.aside.exists() and not place.aside.is_dir():
        raise of_file(place.aside, cause="would be lost")(
            "is needed as the folder for files that are in the way", "rename that file"
        )
    target = find_free_name(place.aside / path)
    logger.warning("%s is not as installed, or is yours: it is moved to %s", place.folder / path, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(place.folder / path, target)


def find_free_name(path: Path) -> Path:
    """Return `path`, with a number if the name is taken."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
