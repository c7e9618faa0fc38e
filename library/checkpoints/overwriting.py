"""Protection of files and folders: a command replaces only those that it wrote itself."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Literal

from library.base.errors import UserError, about, of_file
from library.checkpoints.marks import (
    JPEG_START,
    PNG_START,
    TAR_AT,
    TAR_WORD,
    ZIP_START,
    has_changed,
    is_sealed,
    read_mark,
)

logger = logging.getLogger(__name__)

START_BYTES = 4096
Standing = Literal["free", "ours", "foreign"]
"""Free: nothing is lost at a path; ours: an earlier call of the same command wrote it; foreign: neither."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file or folder that a command writes, and how it knows its own."""

    name: str  # with article, for messages
    is_own: Callable[[Path], bool]  # given a file or a folder with content
    is_folder: bool = False


def known_by_start(name: str, recognises: Callable[[bytes], bool]) -> FileKind:
    """Return a kind of file without a mark, recognised by its first `START_BYTES` bytes."""
    return FileKind(name, lambda path: recognises(read_start(path)))


def marked(name: str, mark: str, is_folder: bool = False) -> FileKind:
    """Return a kind of file, or of diffusers folder, that carries `mark` and has not been changed since."""
    return FileKind(name, lambda path: read_mark(path) == mark and not has_changed(path), is_folder)


def sealed(name: str, first_line: str) -> FileKind:
    """Return a kind of text file that `seal_text` has written and nobody has changed since."""
    return FileKind(name, lambda path: is_sealed(path, first_line))


def judge(path: Path, kind: FileKind) -> Standing:
    """Decide whether a file or folder of this kind may be written to `path`.

    Nothing is lost where nothing exists, in an empty file or folder, and in a special file such as /dev/null.
    """
    try:
        if path.is_dir():
            if not any(path.iterdir()):
                return "free" if kind.is_folder else "foreign"
            return "ours" if kind.is_folder and kind.is_own(path) else "foreign"
        if not path.is_file() or path.stat().st_size == 0:
            return "free"
        return "ours" if not kind.is_folder and kind.is_own(path) else "foreign"
    except (OSError, UserError):  # what cannot be read cannot be told from a foreign file
        return "foreign"


def check_target(flag: str, path: Path, kind: FileKind, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError if writing `path` would destroy one of `inputs`, or anything that this command did not write.

    `flag` names the option in messages.
    """
    check_not_input(flag, path, inputs)
    if path.is_dir() and not kind.is_folder:
        raise about(flag, path)("is a folder", "use the name of a file")
    if judge(path, kind) == "foreign":
        raise about(flag, path, cause="would be lost")(
            f"exists and is {describe(path)}, not {kind.name}: it would be lost. Use another name, or move it away"
        )


def find_place(path: Path, kind: FileKind) -> Path:
    """Return the path to write during a run: `path`, or a name beside it if another program has put something there
    since the start, as the log then says. Never raises for that."""
    if judge(path, kind) != "foreign":
        return path
    names = alternative_names(path, "" if kind.is_folder else path.suffix)
    place = next(name for name in names if not os.path.lexists(name) or judge(name, kind) == "ours")
    logger.warning("%s is %s, not %s, and is kept; saving %s instead", path, describe(path), kind.name, place)
    return place


def alternative_names(path: Path, ending: str, folder: Path | None = None) -> Iterator[Path]:
    """Yield other names for a path, `<name>-rescued<ending>` and so on, in its folder or in another `folder`."""
    stem = f"{path.name.removesuffix(ending)}-rescued"
    for number in count(1):
        yield (folder or path.parent) / f"{stem}{'' if number == 1 else f'-{number}'}{ending}"


def check_not_input(flag: str, path: Path, inputs: Iterable[Path | None]) -> None:
    """Raise UserError if `path` is one of `inputs` or an existing file inside one of them; links are resolved."""
    for input_path in inputs:
        if input_path is None or not path.exists() or not input_path.exists():
            continue
        if path.samefile(input_path) or (input_path.is_dir() and input_path.resolve() in path.resolve().parents):
            raise about(flag, path, cause="would be lost")(
                "is also read by this command and would be lost", "use another name"
            )


def read_start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(START_BYTES)


STARTS = (
    ("a PNG image", PNG_START), ("a JPEG image", JPEG_START), ("a web page", b"<!doctype html"),
    ("a web page", b"<html"), ("a pickled checkpoint or an archive", ZIP_START),
)  # fmt: skip


def describe(path: Path) -> str:
    """Describe an existing file or folder for messages, with its mark if it has one."""
    try:
        words = f"a folder of {len(os.listdir(path))} entries" if path.is_dir() else describe_start(read_start(path))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    mark = read_mark(path)
    return words if mark is None else f"{words} ({mark}{', changed since' if has_changed(path) else ''})"


def describe_start(start: bytes) -> str:
    """Name the type of a file that begins with `start`."""
    lower = start[:16].lower()
    if (name := next((name for name, known in STARTS if lower.startswith(known.lower())), None)) is not None:
        return name
    if start[8:9] == b"{" and not start.startswith(b"{"):  # behind the length of the header
        return "a safetensors file"
    if start[TAR_AT : TAR_AT + len(TAR_WORD)] == TAR_WORD:
        return "a tar archive"
    is_text = b"\0" not in start
    return "a text file" if is_text else "a file of another type"


def open_lock_file(path: Path, kind: FileKind) -> IO[str]:
    """Open or create a file whose lock protects other files; its content is kept.

    Raises UserError for a symbolic link, because writing would follow it, and for a file of another kind.
    """
    if path.is_symlink():
        raise of_file(path)(f"is a symbolic link, but must be {kind.name}", "remove the link")
    check_target("the lock file", path, kind)
    # O_NOFOLLOW, which Windows lacks, refuses a link that is created after the check above.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    return os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
