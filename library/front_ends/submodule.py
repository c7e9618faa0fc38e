"""Keeps git from replacing an installed folder that is a submodule, or part of one."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from library.base.errors import error_in, of_file

NONE = "none"  # the setting with which `git submodule update` skips a submodule


@dataclass(frozen=True)
class Submodule:
    """A submodule of a git repository."""

    repository: Path  # the superproject's folder
    name: str

    @property
    def setting(self) -> str:
        """The name of the setting that says how git updates it."""
        return f"submodule.{self.name}.update"


def find_submodule(folder: Path, front_end: Path) -> Submodule | None:
    """Return the submodule that `folder` is or is a part of, looked for up to the folder of the front end.

    Raises UserError if git is missing or refuses to read the repository.
    """
    folder, front_end = folder.resolve(), front_end.resolve()
    candidates = [path for path in (folder, *folder.parents) if path.is_relative_to(front_end)]
    if shutil.which("git") is None:
        if any((path / ".git").exists() for path in candidates):
            raise of_file(front_end, cause="not installed")(
                "is a git repository, but git is not found",
                "install git, or run this command where the front end's own commands run",
            )
        return None
    for path in candidates:
        top = run_git(path.parent, "rev-parse", "--show-toplevel")
        name = find_name(Path(top), path) if top else None
        if top and name is not None:
            return Submodule(Path(top), name)
    return None


def find_name(repository: Path, folder: Path) -> str | None:
    """Return the name of the submodule in a folder; None if there is none."""
    if not (repository / ".gitmodules").is_file():
        return None
    settings = run_git(repository, "config", "-z", "-f", ".gitmodules", "--get-regexp", r"^submodule\..*\.path$")
    for setting in (settings or "").split("\0"):
        key, _, path = setting.partition("\n")
        if path and (repository / path).resolve() == folder:
            return key.removeprefix("submodule.").removesuffix(".path")
    return None


def read_update(submodule: Submodule) -> str | None:
    """Return how git is set to update a submodule; None if unset."""
    return run_git(submodule.repository, "config", "--local", "--get", submodule.setting)


def block_updates(submodule: Submodule) -> None:
    """Make `git submodule update` skip a submodule, also with --force."""
    change_git(submodule.repository, "config", "--local", submodule.setting, NONE)


def unblock_updates(submodule: Submodule, earlier: str | None) -> None:
    """Put the earlier setting back, unless the user has changed it since."""
    if read_update(submodule) != NONE or earlier == NONE:
        return
    if earlier is None:
        change_git(submodule.repository, "config", "--local", "--unset", submodule.setting)
    else:
        change_git(submodule.repository, "config", "--local", submodule.setting, earlier)


def read_head(folder: Path) -> str | None:
    """Return the commit that is checked out in a folder; None if it is no repository of its own."""
    if not (folder / ".git").exists():
        return None
    return run_git(folder, "rev-parse", "--verify", "--quiet", "HEAD")


def restore_head(folder: Path, head: str) -> None:
    """Set a detached HEAD and the index to the commit of the files in the folder, which stay as they are.

    `git pull --recurse-submodules` moves them where the files that it would change were moved away.
    """
    moved_to = read_head(folder)
    if moved_to not in (None, head) and run_git(folder, "symbolic-ref", "--quiet", "HEAD") is None:
        change_git(folder, "reset", "--quiet", head)


def run_git(folder: Path, *words: str, typed: str | None = None) -> str | None:
    """Return the output of a git command, to which `typed` is sent, without the final line break; None if it fails.

    Raises UserError if git does not trust the repository.
    """
    if not folder.is_dir():
        return None
    process = start_git(folder, *words, typed=typed)
    if process.returncode != 0 and "dubious ownership" in process.stderr:
        raise error_in(path=folder, cause="unreadable")(
            f"git does not trust {folder}, which another user owns: {process.stderr.strip()}"
        )
    return process.stdout.rstrip("\n") if process.returncode == 0 else None


def change_git(folder: Path, *words: str) -> None:
    """Run a git command. Raises UserError with git's message if it fails."""
    process = start_git(folder, *words)
    if process.returncode != 0:
        raise error_in(path=folder)(f"`git {' '.join(words)}` in {folder} failed: {process.stderr.strip()}")


def start_git(folder: Path, *words: str, typed: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "LC_ALL": "C"}  # messages in English
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(
        command,
        env=environment,
        input=typed,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
    )
