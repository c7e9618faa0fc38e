"""Renaming of dotted weight names."""

from collections.abc import Mapping


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def swap_stem(key: str, stems: Mapping[str, str]) -> str | None:
    """Replace the leading part of the dotted name `key` that is a key of `stems`; return None if no key matches."""
    for old, new in stems.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return None
