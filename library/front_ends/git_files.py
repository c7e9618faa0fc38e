"""Hides from git what is kept beside an installed folder, and finds the files in it that are as in its commit."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from library.front_ends.journal import Place
from library.front_ends.submodule import change_git, read_head, run_git

MARK = "# written by tools/front_end.py until --restore: "


def hide_kept(place: Place) -> None:
    """List what is kept beside the folder in the repository's own list of ignored files, so that `git clean`,
    `git stash -u` and `git add -A` leave it alone."""
    path = find_exclude(place)
    if path is None:
        return
    lines = read_lines(path)
    wanted = list_patterns(place)
    if wanted[0] not in lines:
        write_lines(path, [*lines, *wanted])


def show_kept(place: Place) -> None:
    """Take the lines of `hide_kept` out again."""
    path = find_exclude(place)
    if path is None:
        return
    lines, written = read_lines(path), list_patterns(place)
    if written[0] in lines:
        write_lines(path, [line for line in lines if line not in written])


def find_exclude(place: Place) -> Path | None:
    """Return the list of ignored files of the repository that the folder's parent is in; None without one."""
    parent = place.folder.parent
    if shutil.which("git") is None:
        return None
    name = run_git(parent, "rev-parse", "--git-path", "info/exclude")
    return None if name is None else (parent / name).resolve()


def list_patterns(place: Place) -> list[str]:
    """Return the lines for one folder: a comment, and a pattern for each name beside it."""
    prefix = run_git(place.folder.parent, "rev-parse", "--show-prefix") or ""
    kept = (place.original, place.aside, place.journal, place.part)
    patterns = ["/" + re.sub(r"([\\*?\[\]])", r"\\\1", prefix + path.name) for path in kept]
    return [MARK + prefix + place.folder.name, *patterns]


def read_lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "surrogateescape").splitlines() if path.is_file() else []


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name("exclude.front_end")
    with open(part, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(part, path)


def list_committed(folder: Path) -> list[str]:
    """Return the files of a repository's folder that are as in its commit; none if it is no repository of its own."""
    if read_head(folder) is None:
        return []
    entries = (run_git(folder, "ls-tree", "-r", "-z", "HEAD") or "").split("\0")
    committed = {path: entry.split(" ")[2] for entry, _, path in (line.partition("\t") for line in entries) if path}
    present = [
        path
        for path in committed
        if path[0] != '"' and "\n" not in path and (folder / path).is_file() and not (folder / path).is_symlink()
    ]
    digests = run_git(folder, "hash-object", "--stdin-paths", typed="".join(f"{path}\n" for path in present)) or ""
    return [path for path, digest in zip(present, digests.split(), strict=False) if digest == committed[path]]


def follow_branch(folder: Path, head: str) -> bool:
    """Bring the files of the commit `head` to that of the branch, which was pulled since. If git refuses, because the
    user has changed one of them, they stay as they are, and False is returned."""
    if run_git(folder, "symbolic-ref", "--quiet", "HEAD") is None or read_head(folder) in (None, head):
        return True
    change_git(folder, "read-tree", head)
    run_git(folder, "update-index", "-q", "--refresh")
    if run_git(folder, "read-tree", "-m", "-u", head, "HEAD") is not None:
        return True
    change_git(folder, "read-tree", "HEAD")
    run_git(folder, "update-index", "-q", "--refresh")
    return run_git(folder, "diff-files", "--quiet") is not None
