"""Thumbnails, and the names of folders."""

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image, ImageOps

from library.base.errors import of_file
from library.data.decoding.images import open_image
from library.data.description.image_extensions import image_extensions
from library.page.store import shorten_hash

THUMBNAIL_SIDE = 320  # pixels, for screens with two per point
MOST_LISTED = 2_000  # folders
AT_ONCE = threading.Semaphore(4)  # a decoded photo may take 300 MB


def make_thumbnail(path: Path, cache: Path) -> Path:
    """Return a small JPEG of a photo, made when it is first asked for and kept until the photo changes.

    Raises UserError for a file that cannot be decoded.
    """
    status = path.stat()
    small = cache / f"{shorten_hash(f'{path} {status.st_mtime_ns} {status.st_size}')}.jpg"
    if small.exists():
        return small
    unfinished = small.with_name(f".{small.name}.{uuid4().hex[:12]}")
    try:
        with AT_ONCE, open_image(str(path)) as image:
            image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            image.thumbnail((2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE), Image.Resampling.BOX)
            upright = ImageOps.exif_transpose(image).convert("RGB")
            upright.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            upright.save(unfinished, "JPEG", quality=80)
        os.replace(unfinished, small)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise of_file(path, cause="unreadable")(f"cannot be decoded: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return small


def list_folder(path: Path) -> dict[str, Any]:
    """Return the folders in a folder by name, and how many photos it holds. Nothing is opened.

    Raises UserError for a folder that cannot be listed.
    """
    endings, folders, num_photos = image_extensions(), [], 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    num_photos += entry.name.endswith(endings)
    except OSError as error:
        raise of_file(path, cause="unreadable")(f"cannot be opened: {error.strerror}") from None
    above = str(path.parent) if path.parent != path else None
    shown = sorted(folders, key=str.lower)[:MOST_LISTED]
    return {"path": str(path), "above": above, "folders": shown, "num_photos": num_photos}
