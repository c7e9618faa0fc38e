"""Renaming of dotted weight names."""

from collections.abc import Mapping


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def swap_stem(key: str, stems: Mapping[str, str]) -> str | None:
    """Replace the first dotted names of `key` by `stems`; return None if it begins with none of them."""
    for old, new in stems.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return None
