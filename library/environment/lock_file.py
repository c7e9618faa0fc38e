"""The parts of requirements.lock that are installed: `uv pip compile` writes each package with hashes and users.

An old Python must be able to parse this file, so annotations are quoted.
"""

import re


class Entry:
    """A pinned package for some Pythons and systems: its requirement, the lines of its hashes, and who needs it."""

    def __init__(self, requirement: str) -> None:
        self.requirement = requirement
        self.name = requirement.partition("==")[0]
        self.hashes = []  # type: list[str]
        self.users = set()  # type: set[str]

    def format(self, with_hashes: bool) -> str:
        return " \\\n    ".join([self.requirement, *(self.hashes if with_hashes else [])])


def read_entries(text: str) -> "list[Entry]":
    """Read a lock file."""
    entries = []  # type: list[Entry]
    for line in text.splitlines():
        words = line.strip(" \\")
        if line[:1].strip(" #"):
            entries.append(Entry(words))
        elif words.startswith("--hash="):
            entries[-1].hashes.append(words)
        elif entries and re.match(r"#( via)? ", words):
            entries[-1].users.add(re.sub(r"#( via)?\s+", "", words))
    return entries


def list_beside_torch(entries: "list[Entry]") -> "set[str]":
    """Return the packages that would be needed without torch; the others, such as CUDA's, depend on its build."""
    # Not the packages that only torch needs: CUDA's also need each other in circles.
    needed, count = set(), -1  # type: set[str], int
    while len(needed) > count:
        count = len(needed)
        for entry in entries:
            if entry.name != "torch" and any(user.startswith("-r ") or user in needed for user in entry.users):
                needed.add(entry.name)
    return needed


def format_entries(text: str, with_torch: bool, with_hashes: bool) -> str:
    """Return the requirements of a lock file, one a line.

    Without hashes they fit wheels that are built elsewhere; without torch and its own, any build of it.
    """
    entries = read_entries(text)
    chosen = {entry.name for entry in entries} if with_torch else list_beside_torch(entries)
    return "".join(entry.format(with_hashes) + "\n" for entry in entries if entry.name in chosen)
