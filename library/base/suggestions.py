"""Suggestions of the known name or file closest to a misspelled one."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

USUAL = 0.6  # minimum share of matching letters


def nearest_name(given: str, known: Iterable[str], least: float = USUAL) -> str | None:
    """Return the known name closest to `given`, ignoring case; None if none reaches the similarity `least`."""
    by_lower_case = {name.lower(): name for name in known}
    matches = get_close_matches(given.lower(), by_lower_case, n=1, cutoff=least)
    return by_lower_case[matches[0]] if matches else None


def did_you_mean(given: str, known: Iterable[str], least: float = USUAL) -> str:
    """Return " (did you mean ...?)" for an unknown name, or ""."""
    nearest = nearest_name(given, known, least)
    return f" (did you mean {nearest}?)" if nearest else ""


def nearby(path: Path, is_folder: bool = False) -> str:
    """Return a hint for a missing path: the most similar name in its folder, or its part that exists.

    With `is_folder`, only folders are suggested.
    """
    # os.path, because a path that is too long is no error there.
    if os.path.isdir(path.parent) and os.access(path.parent, os.R_OK):
        names = (other.name for other in path.parent.iterdir() if other.is_dir() or not is_folder)
        nearest = nearest_name(path.name, names)
        return f"; did you mean {path.parent / nearest}?" if nearest else ""
    existing = next((parent for parent in path.parents if os.path.isdir(parent)), None)
    return f"; only {existing} exists" if existing and existing != Path(".") else ""
