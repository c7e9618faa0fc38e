"""The journal of an installation, which tells the files of this suite from the user's in a folder that both write to.

It lies beside the folder and is written before the folder is touched, so that a run that was killed can be repeated or
undone.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from library.base.errors import of_file

MARK = '{"made_by": "tools/front_end.py", '  # how every journal begins

# Phases of an installation, in order.
DISPLACING = "moving the original away"
WRITING = "writing"
INSTALLED = "installed"
REMOVING = "removing"
RETURNING = "moving the original back"


@dataclass(frozen=True)
class Place:
    """A folder of a front end that scripts are installed into, and what is kept beside it."""

    folder: Path

    @property
    def original(self) -> Path:
        """The folder of the front end's own files."""
        return self.folder.with_name(f"{self.folder.name}.original")

    @property
    def aside(self) -> Path:
        """The folder of the user's files that were in the way."""
        return self.folder.with_name(f"{self.folder.name}.aside")

    @property
    def journal(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.journal.json")

    @property
    def part(self) -> Path:
        """Where a file is written before it is moved to its place."""
        return self.folder.with_name(f"{self.folder.name}.journal.part")


@dataclass(frozen=True)
class Journal:
    """The files of an installation."""

    version: str  # of this suite
    phase: str
    is_whole: bool  # all of the folder was replaced, not only files of some names
    displaced: Sequence[str]  # entries of the folder that are moved to `Place.original`
    files: Mapping[str, Sequence[str]]  # path in the folder -> SHA-256 of each content that is ours
    head: str | None = None  # the folder's commit before the installation
    is_submodule: bool = False
    earlier_update: str | None = None  # the submodule's update setting before the installation


def read_journal(place: Place) -> Journal | None:
    """Return the journal of a folder; None if nothing is installed there.

    Raises UserError if the file is no journal, or a kept original has none: another program made it.
    """
    if place.journal.exists():
        try:
            text = place.journal.read_text(encoding="utf-8")
            fields = json.loads(text)
            del fields["made_by"]
            journal = Journal(**fields)
            require_journal(journal)
            return journal
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise of_file(place.journal, cause="unreadable")(
                "is damaged or not a journal of this tool", "rename it, and run the command again"
            ) from error
    if os.path.lexists(place.original):
        raise of_file(place.original, cause="would be lost")(
            f"exists, but {place.journal.name} beside it is missing. If it holds the front end's own "
            f"scripts, move {place.folder.name} away and rename it to {place.folder.name}; else give it another name"
        )
    return None


def require_journal(journal: Journal) -> None:
    """Raise ValueError unless the values have their types, and all paths are in the folder."""
    texts = [journal.version, journal.phase, journal.head or "", journal.earlier_update or ""]
    flags = [journal.is_whole, journal.is_submodule]
    lists = [journal.displaced, *(journal.files.values() if isinstance(journal.files, dict) else [None])]
    if not all(isinstance(value, list) for value in lists) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError("a value has another type")
    if not all(isinstance(text, str) for text in [*texts, *(text for values in lists for text in values)]):
        raise ValueError("a value is no text")
    if any(is_outside(path) for path in (*journal.files, *journal.displaced)):
        raise ValueError("a path leads out of the folder")


def is_outside(path: str) -> bool:
    """Return True if a path of a journal is not one in its folder."""
    return PurePath(path).is_absolute() or ".." in PurePath(path).parts


def write_journal(place: Place, journal: Journal) -> None:
    """Replace the journal at once. Raises UserError if `Place.part` is a file of the user's."""
    if not place.journal.exists() and os.path.lexists(place.part) and not is_begun_journal(place.part):
        raise of_file(place.part, cause="would be lost")(
            "was not made by this tool, which needs that name", "rename it"
        )
    text = MARK + json.dumps(asdict(journal), indent=1, ensure_ascii=False)[1:].lstrip() + "\n"
    with open(place.part, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(place.part, place.journal)


def discard_begun_journal(place: Place) -> None:
    """Delete what a run left that was killed before its journal was complete."""
    if not place.journal.exists() and os.path.lexists(place.part) and is_begun_journal(place.part):
        os.unlink(place.part)


def is_begun_journal(path: Path) -> bool:
    """Return True for the beginning of a journal."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(len(MARK))
    return MARK.encode().startswith(start)


def digest_file(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if there is no file, or a link, which this tool never makes."""
    if path.is_symlink() or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Differences:
    """How an installed folder differs from its journal."""

    missing: Sequence[str]
    changed: Sequence[str]
    is_complete: bool

    def __str__(self) -> str:
        parts = [] if self.is_complete else ["the last installation was interrupted"]
        for paths, word in ((self.changed, "changed"), (self.missing, "missing")):
            if paths:
                others = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
                parts.append(f"{word}: {', '.join(paths[:5])}{others}")
        return "; ".join(parts)


def compare_with_journal(place: Place, journal: Journal) -> Differences:
    """Compare the installed files with the journal. The user's own files beside them are no difference."""
    digests = {path: digest_file(place.folder / path) for path in journal.files}
    return Differences(
        missing=[path for path in digests if not os.path.lexists(place.folder / path)],
        changed=[
            path
            for path, digest in digests.items()
            if os.path.lexists(place.folder / path) and digest not in journal.files[path]
        ],
        is_complete=journal.phase == INSTALLED,
    )
