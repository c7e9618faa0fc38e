"""File and folder names derived from other names."""

import os
from functools import lru_cache
from hashlib import blake2b
from urllib.parse import quote

SAFE = " +,=@"  # characters besides letters, digits and `_.-~` that every file system accepts


def safe_name(name: str) -> str:
    """Convert any name to a valid name of a file that is not hidden."""
    return quote(name, safe=SAFE, errors="surrogatepass").lstrip(".")


def folder_name(folder: str) -> str:
    """Convert the path or URL of a folder to a readable and unique name."""
    location = folder if "://" in folder else os.path.abspath(folder)
    # The digest tells folders of one name apart.
    return f"{safe_name(os.path.basename(location)) or 'images'}-{short_digest(location)[:8]}"


def same_file_key(path: str) -> str:
    """Return a key that all paths of a file share: where the file system ignores case, names are case-folded."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.casefold()) if ignores_case(folder) else path


@lru_cache(maxsize=1024)
def ignores_case(folder: str) -> bool:
    """Return True if the file system of a folder ignores case in names; False if the folder is empty or missing."""
    try:
        with os.scandir(folder or ".") as entries:
            # An existing file is looked up under its name in the other case, so nothing has to be written to the
            # folder.
            name = next((entry.name for entry in entries if entry.name.swapcase() != entry.name), None)
        return name is not None and os.path.samefile(
            *(os.path.join(folder, variant) for variant in (name, name.swapcase()))
        )
    except OSError:  # no such folder, or no file of the swapped name
        return False


def short_digest(text: str) -> str:
    """Return a digest of 32 hexadecimal digits."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
