"""Protection against overwriting: a command replaces neither its own inputs nor a file of another type."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from library.errors import UserError

START_BYTES = 4096


@dataclass(frozen=True)
class FileType:
    """A type of file that commands write, recognised by its first `START_BYTES` bytes."""

    name: str  # with article, for messages
    recognises: Callable[[bytes], bool]


PNG = FileType("a PNG image", lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"))


def check_overwrite(flag: str, path: Path, file_type: FileType, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError if writing `path` would destroy one of `inputs` or a file of another type.

    `flag` names the option in messages. Empty files and special files (/dev/null) may be overwritten.
    """
    check_not_input(flag, path, inputs)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; use the name of a file")
    if path.is_file():
        with path.open("rb") as file:
            check_start(flag, path, file.read(START_BYTES), file_type)


def check_start(flag: str, path: Path, start: bytes, file_type: FileType) -> None:
    """Raise UserError if a non-empty file that begins with `start` is of another type."""
    if start and not file_type.recognises(start):
        raise UserError(
            f"{flag} {path} exists, is not {file_type.name} and would be overwritten; use another name, or move "
            "the file away"
        )


def check_not_input(flag: str, path: Path, inputs: Iterable[Path | None]) -> None:
    """Raise UserError if `path` is one of `inputs` or an existing file inside one of them; links are resolved."""
    for input_path in inputs:
        if input_path is None or not path.exists() or not input_path.exists():
            continue
        if path.samefile(input_path) or (input_path.is_dir() and input_path.resolve() in path.resolve().parents):
            raise UserError(f"{flag} {path} is also read by this command and would be lost; use another name")


def open_lock_file(path: Path, file_type: FileType) -> IO[str]:
    """Open or create a file whose lock protects other files; its content is kept.

    Raises UserError for a symbolic link, because writing would follow it, and for a file of another type.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, but must be {file_type.name}; remove the link")
    # O_NOFOLLOW, which Windows lacks, refuses a link that is created after the check above.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    # A file of another type need not be UTF-8, but its start has to be readable to be refused.
    file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
    try:
        check_start("the lock file", path, file.read(START_BYTES).encode(), file_type)
    except UserError:
        file.close()
        raise
    return file
