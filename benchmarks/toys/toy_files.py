"""Files of the toy world: written atomically, with a mark of the command, and only over those of the same command."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image

from library.base.atomic_files import atomic_path
from library.checkpoints.folders import atomic_folder
from library.checkpoints.marks import mark_folder, read_mark, save_image
from library.checkpoints.overwriting import FileKind, check_target, known_by_start


def check_scene(flag: str, path: Path, writer: str) -> None:
    """Raise UserError unless the image `path`, and the caption beside it, are free or were written by `writer`."""
    check_target(flag, path, FileKind(f"an image that {writer} wrote", partial(is_by, writer)))
    # A caption has no mark of its own.
    check_target(flag, path.with_suffix(".txt"), FileKind(f"a caption by {writer}", partial(has_own_image, writer)))


def is_by(writer: str, path: Path) -> bool:
    """Return True if a command wrote a file, under any name; the command may have been in another folder."""
    return (read_mark(path) or "").rpartition("/")[2] == Path(writer).name


def has_own_image(writer: str, caption: Path) -> bool:
    return is_by(writer, caption.with_suffix(".png"))


def save_scene(path: Path, image: Image.Image, writer: str, caption: str | None = None) -> None:
    """Write an image and, if given, the caption beside it."""
    save_image(path, image, writer)
    if caption is not None:
        write_text(path.with_suffix(".txt"), caption + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def text_kind(name: str, first_line: str) -> FileKind:
    """Return the kind of text files whose first line matches a pattern."""
    pattern = re.compile(first_line.encode() + rb"\r?\n")
    return known_by_start(name, lambda start: pattern.match(start) is not None)


def check_model_folder(flag: str, path: Path, writer: str) -> None:
    """Raise UserError unless a folder is free or holds a model that `writer` wrote."""
    kind = FileKind(f"a model that {writer} wrote", partial(is_by, writer), is_folder=True)
    check_target(flag, path, kind)


@contextmanager
def new_model(path: Path, writer: str) -> Iterator[Path]:
    """Yield a temporary folder for the files of a model; with other files of the old folder, such as a README, it
    replaces the old one if the block succeeds."""
    with atomic_folder(path) as folder:
        yield folder
        mark_folder(folder, writer, counts_files=False)
        for old in sorted(path.rglob("*")) if path.is_dir() else ():
            new = folder / old.relative_to(path)
            if old.is_file() and not new.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(old, new)
