"""Opens pictures, wherever they lie: files, parts of larger files, rows of Parquet files."""

import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from math import prod
from typing import Any, TypeVar

from library.data.description.schema import without_secrets
from library.data.scanned.images import FileStamp, Picture, Place, Version, digest_of
from library.data.scanned.names import folder_name, safe_name, short_digest
from library.data.sources.storage import object_storage
from library.data.sources.storage.disk_cache import DiskCache
from library.data.sources.storage.ranges import RangeFile, Window
from library.errors import UserError

CHUNK_BYTES = 5120  # a picture's end, the header behind it, and the beginning of the next one
BRACES = re.compile(r"\{(?:(?P<first>[0-9]{1,18})\.\.(?P<last>[0-9]{1,18})|(?P<choices>[^{}]*,[^{}]*))\}")
GLOB, GLOB_IN_URL = re.compile(r"[*?\[]"), re.compile(r"\*")
REMOTE_CHUNK_BYTES = 16384  # a request takes longer than so much more in its answer
READ_FOLDER = "read"
MOST_NAMES = 1_000_000  # that a pattern stands for
MOST_OPEN = 64  # files; what stands at the end of a Parquet file can have megabytes
GB = 10**9

T = TypeVar("T")


@dataclass
class Opened:
    """What stays open in this process."""

    files: dict[str, Any] = field(default_factory=dict)  # what readers opened
    shared: dict[type[Any], Any] = field(default_factory=dict)  # what readers of several files have in common
    cache: DiskCache | None = None
    lock: Any = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[type["Opened"], tuple[()]]:
        return Opened, ()


@dataclass(frozen=True)
class Storage:
    """Reads pictures. Travels to workers as plain values; what is opened is opened there."""

    cache_dir: str | None = None
    remote_cache_gb: float = 20.0  # of pictures that were read over the network
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
        if is_remote(place.file):
            return self._read_remote(place)
        if place.reader is not None:
            return place.reader.read(self, place)
        return self.read_range(place.file, place.start, place.num_bytes)

    def read_ahead(self, pictures: Iterable[Picture]) -> None:
        """Bring what lies behind URLs to the disk, at the same time: its reading waits for one answer, not for each."""
        places = [picture.place for picture in pictures if picture.place is not None]
        places = [place for place in places if is_remote(place.file) and place.reader is None]
        missing = [place for place in dict.fromkeys(places) if not self.disk_cache.path(name_of(place)).exists()]
        if len(missing) > 1:
            ranges = [(place.file, place.start, place.num_bytes) for place in missing]
            for place, content in zip(missing, object_storage.read_ranges(ranges), strict=True):
                if content is not None:
                    self.disk_cache.put(name_of(place), content)

    @property
    def disk_cache(self) -> DiskCache:
        """Where pictures that came over the network are kept."""
        cache_dir = self.required_cache_dir("pictures behind a URL")
        if self.opened.cache is None:
            self.opened.cache = DiskCache(os.path.join(cache_dir, READ_FOLDER), int(self.remote_cache_gb * GB))
        return self.opened.cache

    def required_cache_dir(self, what: str) -> str:
        """--cache_dir. Raises UserError where it is not given."""
        if self.cache_dir is None:
            raise UserError(f"{what} need --cache_dir, a folder on a disk: the index and what was read is kept there")
        return self.cache_dir

    def _read_remote(self, place: Place) -> bytes:
        content = self.disk_cache.get(name_of(place))
        if content is not None and digest_of(content) == place.digest:
            return content
        if place.reader is not None:
            # All pictures of the group come with the one that is asked for, and each is asked for sooner or later.
            for start, value in place.reader.read_group(self, place):
                self.disk_cache.put(name_of(place._replace(start=start)), value)
                content = value if start == place.start else content
        else:
            content = self.read_range(place.file, place.start, place.num_bytes)
            self.disk_cache.put(name_of(place), content)
        if content is None or digest_of(content) != place.digest:
            raise UserError(f"{without_secrets(place.file)} was replaced since it was indexed; start again")
        return content

    # Files

    def kept_open(self, file: str, open_file: Callable[[], T]) -> T:
        """Return what `open_file` gives, from an earlier call for the same file if it is still open."""
        with self.opened.lock:
            if file not in self.opened.files:
                if len(self.opened.files) >= MOST_OPEN:
                    self.opened.files.pop(next(iter(self.opened.files)))
                self.opened.files[file] = open_file()
            found: T = self.opened.files[file]
            return found

    def shared(self, kind: type[T]) -> T:
        """Return the one object of a class without arguments that all readers of this process share."""
        found: T = self.opened.shared.setdefault(kind, kind())
        return found

    def read_range(self, file: str, start: int, num_bytes: int) -> bytes:
        """Some bytes of a file."""
        if is_remote(file):
            return object_storage.read_url(file, start, num_bytes)
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
        if is_remote(file):
            return object_storage.stamp_of_url(file)
        status = os.stat(file)
        return FileStamp(status.st_size, str(status.st_mtime_ns))

    def window(self, file: str, file_bytes: int | None = None) -> Window:
        """A file to be read from front to back, some of it passed over."""
        num_bytes = self.stamp(file).num_bytes if file_bytes is None else file_bytes
        return Window(partial(self.read_range, file), num_bytes, REMOTE_CHUNK_BYTES if is_remote(file) else CHUNK_BYTES)

    def file(self, file: str) -> RangeFile:
        """A file object."""
        return RangeFile(self.window(file))

    def matching(self, pattern: str) -> list[str]:
        """The files that a pattern names, in order: `{000..013}` counts, `*` matches what is there, `?` on a disk."""
        num_names = count_names(pattern)
        if num_names > MOST_NAMES:
            raise UserError(
                f"{without_secrets(pattern)!r} stands for {num_names} names; at most {MOST_NAMES} are listed"
            )
        found: list[str] = []
        for path in expanded(pattern):
            if is_remote(path):
                found += object_storage.matching_urls(path) if GLOB_IN_URL.search(path) else [path]
            else:
                found += sorted(glob(path)) if GLOB.search(path) and not os.path.exists(path) else [path]
        return found

    def cache_stem(self, picture: Picture) -> str:
        """The path that names of its cache files begin with: beside a picture, in a folder beside a larger file.

        Under --cache_dir each folder of such files has one of its own, for two may hold files of the same name.
        """
        place = picture.place
        if place is None:
            return os.path.splitext(picture.key)[0]
        shard = picture.key.removesuffix(place.name).rstrip("/")
        name = safe_name(os.path.splitext(place.name)[0]) if shard else short_digest(picture.key)
        folder, file = os.path.split(shard)
        if is_remote(picture.key):
            self.required_cache_dir("caches of pictures behind a URL")
        folder = folder if self.cache_dir is None else os.path.join(self.cache_dir, folder_name(folder))
        return os.path.join(folder, f"{os.path.splitext(file)[0] or 'pictures'}.cache", name)


def is_remote(file: str) -> bool:
    """Whether a name is a URL."""
    return "://" in file


def name_of(place: Place) -> str:
    """What a picture is called in the disk cache. Its digest tells whether the content is still the one."""
    size, reader = (place.num_bytes, "") if place.reader is None else ("", place.reader.name)
    return f"{without_secrets(place.file)} {place.start} {size} {reader}"


def count_names(pattern: str) -> int:
    """Return how many names `expanded` lists, without listing them."""
    counts = (
        max(0, int(match["last"]) - int(match["first"]) + 1) if match["first"] else match["choices"].count(",") + 1
        for match in BRACES.finditer(pattern)
    )
    return prod(counts)


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
