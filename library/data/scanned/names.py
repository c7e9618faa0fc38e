"""Names of files and folders that stand for other names."""

import os
from hashlib import blake2b
from urllib.parse import quote

SAFE = " +,=@"  # characters of a name, besides letters, digits and `_.-~`, that every file system takes


def safe_name(name: str) -> str:
    """A name as that of one visible file, whatever characters it has."""
    return quote(name, safe=SAFE, errors="surrogatepass").lstrip(".")


def folder_name(folder: str) -> str:
    """One name for a path or a URL of a folder, which people recognise and no other folder has."""
    whole = folder if "://" in folder else os.path.abspath(folder)
    return f"{safe_name(os.path.basename(whole)) or 'pictures'}-{short_digest(whole)[:8]}"


def short_digest(text: str) -> str:
    """32 hexadecimal digits."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
