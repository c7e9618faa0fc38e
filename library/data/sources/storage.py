"""Opens pictures, wherever they lie: files, parts of larger files, rows of Parquet files."""

import os
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from hashlib import blake2b
from typing import Any, NamedTuple
from urllib.parse import quote

from library.data.description.schema import without_secrets
from library.data.sources.parquet_files import ParquetRows
from library.data.sources.pictures import Picture, Place
from library.data.sources.ranges import RangeFile, Window
from library.errors import UserError

SAFE = " +,=@"  # characters of a name, besides letters, digits and `_.-~`, that every file system takes
CHUNK_BYTES = 5120  # a picture's end, the header behind it, and the beginning of the next one
BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choices>[^{}]*,[^{}]*))\}")
GLOB = re.compile(r"[*?\[]")


class FileStamp(NamedTuple):
    """What differs once a file is another one."""

    num_bytes: int
    mark: str


class Version(NamedTuple):
    """What differs once a picture is another one."""

    num_bytes: int
    stamp: int  # nanoseconds of a file's last change; of a part of a file, bits of the digest in the index


@dataclass
class Opened:
    """Parquet files that stay open, in this process."""

    files: dict[str, ParquetRows] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[type["Opened"], tuple[()]]:
        return Opened, ()


@dataclass(frozen=True)
class Storage:
    """Reads pictures. Travels to workers as plain values; what is opened is opened there."""

    cache_dir: str | None = None
    opened: Opened = field(default_factory=Opened, compare=False, repr=False)

    def content(self, picture: Picture) -> bytes | None:
        """The bytes of a picture; None of one that is a file of its own, which Pillow opens itself."""
        return None if picture.place is None else self.read(picture.place)

    def whole(self, picture: Picture) -> tuple[Version, bytes]:
        """The version and all bytes of a picture. Raises UserError where it cannot be read."""
        if picture.place is not None:
            return self.version(picture), self.read(picture.place)
        try:
            version = self.version(picture)
            with open(picture.key, "rb") as file:
                return version, file.read()
        except OSError as error:
            raise UserError(f"{picture.key} cannot be read: {error.strerror}") from None

    def version(self, picture: Picture) -> Version:
        """What a cached entry of the picture was made from. Raises OSError for a file that is gone."""
        if picture.place is not None:
            return Version(picture.place.num_bytes, int(picture.place.digest[:15], 16))
        status = os.stat(picture.key)
        return Version(status.st_size, status.st_mtime_ns)

    def read(self, place: Place) -> bytes:
        """The bytes at a place. Raises UserError naming a file that cannot be read, or that ends before."""
        if not place.column:
            return self.read_range(place.file, place.start, place.num_bytes)
        with self.opened.lock:
            if place.file not in self.opened.files:
                self.opened.files[place.file] = ParquetRows(self.file(place.file), without_secrets(place.file))
        return self.opened.files[place.file].value(place.column, place.start)

    # Files

    def read_range(self, file: str, start: int, num_bytes: int) -> bytes:
        """Some bytes of a file."""
        try:
            with open(file, "rb", buffering=0) as opened:
                opened.seek(start)
                content = opened.read(num_bytes)
                while len(content) < num_bytes and (more := opened.read(num_bytes - len(content))):
                    content += more
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        if len(content) < num_bytes:
            raise UserError(
                f"{file} ends at byte {start + len(content)}, but something lies before {start + num_bytes}: it was "
                "cut off or replaced since it was indexed; start again, or copy it again"
            )
        return content

    def stamp(self, file: str) -> FileStamp:
        """The size of a file and what differs once it is another one. Raises FileNotFoundError, OSError."""
        status = os.stat(file)
        return FileStamp(status.st_size, str(status.st_mtime_ns))

    def window(self, file: str, file_bytes: int | None = None) -> Window:
        """A file to be read from front to back, some of it passed over."""
        num_bytes = self.stamp(file).num_bytes if file_bytes is None else file_bytes
        return Window(partial(self.read_range, file), num_bytes, CHUNK_BYTES)

    def file(self, file: str) -> RangeFile:
        """A file object."""
        return RangeFile(self.window(file))

    def matching(self, pattern: str) -> list[str]:
        """The files that a pattern names, in order: `{000..013}` counts, `*`, `?` and `[]` match what is there."""
        return [
            file
            for path in expanded(pattern)
            for file in (sorted(glob(path)) if GLOB.search(path) and not os.path.exists(path) else [path])
        ]

    def cache_stem(self, picture: Picture) -> str:
        """The path that names of its cache files begin with: beside a picture, in a folder beside a larger file.

        Under --cache_dir each folder of such files has one of its own, for two may hold files of the same name.
        """
        place = picture.place
        if place is None:
            return os.path.splitext(picture.key)[0]
        shard = picture.key.removesuffix(place.name).rstrip("/")
        name = quote(os.path.splitext(place.name)[0], safe=SAFE).lstrip(".") if shard else short_digest(picture.key)
        folder, file = os.path.split(shard)
        folder = folder if self.cache_dir is None else os.path.join(self.cache_dir, folder_name(folder))
        return os.path.join(folder, f"{os.path.splitext(file)[0] or 'pictures'}.cache", name)


def is_remote(file: str) -> bool:
    """Whether a name is a URL."""
    return "://" in file


def expanded(pattern: str) -> list[str]:
    """A pattern with a text for each number of `{000..013}`, whose digits stay as many, and each of `{a,b}`."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    if match["first"] is not None:
        first, last = match["first"], match["last"]
        numbers = range(int(first), int(last) + 1)
        middles = [str(number).zfill(len(first)) for number in numbers]
    else:
        middles = match["choices"].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + middle + rest for middle in middles for rest in expanded(after)]


def folder_name(folder: str) -> str:
    """One name for a path or a URL of a folder, which people recognise and no other folder has."""
    whole = folder if "://" in folder else os.path.abspath(folder)
    return f"{quote(os.path.basename(whole), safe=SAFE).lstrip('.') or 'pictures'}-{short_digest(whole)[:8]}"


def short_digest(text: str) -> str:
    """32 hexadecimal digits."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
