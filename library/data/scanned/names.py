"""File and folder names derived from other names."""

import os
from hashlib import blake2b
from urllib.parse import quote

SAFE = " +,=@"  # characters besides letters, digits and `_.-~` that every file system accepts


def safe_name(name: str) -> str:
    """Convert any name to that of one visible file."""
    return quote(name, safe=SAFE, errors="surrogatepass").lstrip(".")


def folder_name(folder: str) -> str:
    """Convert a folder's path or URL to one readable and unique name."""
    whole = folder if "://" in folder else os.path.abspath(folder)
    return f"{safe_name(os.path.basename(whole)) or 'images'}-{short_digest(whole)[:8]}"


def short_digest(text: str) -> str:
    """Return a digest of 32 hexadecimal digits."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
