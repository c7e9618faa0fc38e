"""Access to images: separate files, byte ranges of larger files, and rows of Parquet files."""

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from math import prod
from typing import Any, TypeVar

from library.base.errors import error_in, of_file
from library.base.formatting import format_bytes
from library.data.description.schema import SubsetConfig, strip_secrets
from library.data.scanned.images import FileStamp, ImageLocation, ScannedImage, Version, digest_content
from library.data.scanned.names import folder_name, safe_name, short_digest
from library.data.sources.storage import object_storage
from library.data.sources.storage.disk_cache import DiskCache
from library.data.sources.storage.index_places import IndexPlaces
from library.data.sources.storage.ranges import RangeFile, Window

CHUNK_BYTES = 5120  # the end of an image, the next header, and the start of the next image
BRACES = re.compile(r"\{(?:(?P<first>[0-9]{1,18})\.\.(?P<last>[0-9]{1,18})|(?P<choices>[^{}]*,[^{}]*))\}")
# In a URL `?` begins the parameters.
GLOB, GLOB_IN_URL = re.compile(r"[*?\[]"), re.compile(r"\*")
REMOTE_CHUNK_BYTES = 16384  # a request takes longer than transferring this much
READ_FOLDER = "read"
MOST_NAMES = 1_000_000  # names that a pattern may list
MOST_OPEN = 64  # files; a Parquet footer can take megabytes
GB = 10**9

T = TypeVar("T")


@dataclass
class Opened:
    """The open files of a process. Pickling leaves them out."""

    files: dict[str, Any] = field(default_factory=dict)  # opened by readers
    shared: dict[type[Any], Any] = field(default_factory=dict)  # shared by readers of several files
    cache: DiskCache | None = None
    lock: Any = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[type["Opened"], tuple[()]]:
        return Opened, ()


@dataclass(frozen=True)
class Storage:
    """Access to images. Workers get the settings and open their own files."""

    cache_dir: str | None = None
    remote_cache_gb: float = 20.0  # for images read over the network
    shared_cache_dir: str | None = None  # of the cache files of all images
    spare_dir: str | None = None  # for caches and indexes of folders that cannot be written
    unwritable: frozenset[str] = frozenset()  # folders whose caches go into `spare_dir`
    keeps_indexes: bool = True  # indexes of the images may be written
    opened: Opened = field(default_factory=Opened, compare=False, repr=False)

    def check_shared_room(self, what: str, num_bytes: int) -> None:
        """Raise UserError if `shared_cache_dir` is set and has no room for this many bytes."""
        if self.shared_cache_dir is None:
            return
        os.makedirs(self.shared_cache_dir, exist_ok=True)
        free = shutil.disk_usage(self.shared_cache_dir).free
        if num_bytes > free:
            raise error_in("--shared_cache_dir")(
                f"--shared_cache_dir {self.shared_cache_dir}: {what} take {format_bytes(num_bytes)}, and "
                f"{format_bytes(free)} are free on its disk",
                "make room, or put --output_dir on another disk",
            )

    def content(self, image: ScannedImage) -> bytes | None:
        """Return the bytes of an image; None for an image in its own file, which Pillow opens itself."""
        return None if image.location is None else self.read(image.location)

    def whole(self, image: ScannedImage) -> tuple[Version, bytes]:
        """Return the version and the bytes of an image. Raises UserError if it cannot be read."""
        if image.location is not None:
            return self.version(image), self.read(image.location)
        try:
            version = self.version(image)
            with open(image.key, "rb") as file:
                return version, file.read()
        except OSError as error:
            raise of_file(image.key, cause="unreadable")(f"cannot be read: {error.strerror}") from None

    def version(self, image: ScannedImage) -> Version:
        """Return the version that cached entries are compared with. Raises OSError for a missing file."""
        if image.location is not None:
            return Version(image.location.num_bytes, int(image.location.digest[:15], 16))
        status = os.stat(image.key)
        return Version(status.st_size, status.st_mtime_ns)

    def read(self, location: ImageLocation) -> bytes:
        """Return the bytes of an image. Raises UserError if the file cannot be read, is too short, or was replaced."""
        if is_remote(location.file):
            return self._read_remote(location)
        if location.reader is not None:
            return location.reader.read(self, location)
        return self.read_range(location.file, location.start, location.num_bytes)

    def read_ahead(self, images: Iterable[ScannedImage]) -> None:
        """Fetch images at URLs to the disk cache concurrently, which takes one round trip instead of one per image."""
        locations = [image.location for image in images if image.location is not None]
        locations = [location for location in locations if is_remote(location.file) and location.reader is None]
        missing = [one for one in dict.fromkeys(locations) if not self.disk_cache.path(cache_name(one)).exists()]
        if len(missing) > 1:
            ranges = [(location.file, location.start, location.num_bytes) for location in missing]
            for location, content in zip(missing, object_storage.read_ranges(ranges), strict=True):
                if content is not None:
                    self.disk_cache.put(cache_name(location), content)

    @property
    def disk_cache(self) -> DiskCache:
        """The cache of images read over the network. Raises UserError without a cache folder."""
        cache_dir = self.required_cache_dir("images at URLs")
        if self.opened.cache is None:
            self.opened.cache = DiskCache(os.path.join(cache_dir, READ_FOLDER), int(self.remote_cache_gb * GB))
        return self.opened.cache

    def required_cache_dir(self, what: str) -> str:
        """Return the cache folder. Raises UserError, starting with `what`, if none is set."""
        if self.cache_dir is None:
            raise error_in("--cache_dir", cause="needs")(
                f"{what} require --cache_dir, a folder for the index and downloaded images"
            )
        return self.cache_dir

    def _read_remote(self, location: ImageLocation) -> bytes:
        content = self.disk_cache.get(cache_name(location))
        # The cached file may be damaged, or older than the index.
        if content is not None and digest_content(content) == location.digest:
            return content
        if location.reader is not None:
            # The whole row group has to be read. Keep its other images, because each will be drawn sooner or later.
            for start, value in location.reader.read_group(self, location):
                self.disk_cache.put(cache_name(location._replace(start=start)), value)
                content = value if start == location.start else content
        else:
            content = self.read_range(location.file, location.start, location.num_bytes)
            self.disk_cache.put(cache_name(location), content)
        if content is None or digest_content(content) != location.digest:
            # Only an image in a file of its own starts at byte 0 and has no reader; a start does not look at it again.
            is_own_file = location.start == 0 and location.reader is None
            remedy = "delete .picture_index-*.parquet below --cache_dir and " if is_own_file else ""
            raise of_file(strip_secrets(location.file))(f"was replaced since it was indexed; {remedy}restart the run")
        return content

    # Files

    def kept_open(self, file: str, open_file: Callable[[], T]) -> T:
        """Return what `open_file` returned for this file earlier; call it if there is nothing."""
        with self.opened.lock:
            if file not in self.opened.files:
                if len(self.opened.files) >= MOST_OPEN:
                    self.opened.files.pop(next(iter(self.opened.files)))
                self.opened.files[file] = open_file()
            opened: T = self.opened.files[file]
            return opened

    def shared(self, kind: type[T]) -> T:
        """Return the instance of a class that all readers of this process share."""
        instance: T = self.opened.shared.setdefault(kind, kind())
        return instance

    def read_range(self, file: str, start: int, num_bytes: int) -> bytes:
        """Read a byte range of a file. Raises UserError if the file cannot be read or is too short."""
        if is_remote(file):
            return object_storage.read_url(file, start, num_bytes)
        try:
            # Without a buffer exactly the range is read, but a single call may return fewer bytes.
            with open(file, "rb", buffering=0) as opened:
                opened.seek(start)
                content = opened.read(num_bytes)
                while len(content) < num_bytes and (more := opened.read(num_bytes - len(content))):
                    content += more
        except OSError as error:
            raise of_file(file, cause="unreadable")(f"cannot be read: {error.strerror}") from None
        if len(content) < num_bytes:
            raise error_in(path=file, cause="unreadable")(
                f"{file} ends at byte {start + len(content)}, before an indexed image at {start + num_bytes}: it was "
                "truncated or replaced since it was indexed",
                "restart the run, or copy it again",
            )
        return content

    def stamp(self, file: str) -> FileStamp:
        """Return the size of a file and a mark that changes when it is replaced. Raises FileNotFoundError, OSError
        or UserError."""
        if is_remote(file):
            return object_storage.stamp_of_url(file)
        status = os.stat(file)
        return FileStamp(status.st_size, str(status.st_mtime_ns))

    def window(self, file: str, file_bytes: int | None = None) -> Window:
        """Return a window for reading a file mostly from start to end."""
        num_bytes = self.stamp(file).num_bytes if file_bytes is None else file_bytes
        return Window(partial(self.read_range, file), num_bytes, REMOTE_CHUNK_BYTES if is_remote(file) else CHUNK_BYTES)

    def file(self, file: str) -> RangeFile:
        """Return a read-only file object for a path or URL."""
        return RangeFile(self.window(file))

    def matching(self, pattern: str) -> list[str]:
        """Return the files that a pattern names, in order. `{000..013}` and `{a,b}` are expanded, `*` matches
        existing files; local paths may also use `?` and `[...]`. Raises UserError for too many names."""
        num_names = count_names(pattern)
        if num_names > MOST_NAMES:
            raise error_in(path=strip_secrets(pattern))(
                f"{strip_secrets(pattern)!r} lists {num_names} files; the maximum is {MOST_NAMES}"
            )
        paths: list[str] = []
        for path in expand_pattern(pattern):
            if is_remote(path):
                paths += object_storage.list_matching_urls(path) if GLOB_IN_URL.search(path) else [path]
            else:
                # The name of an existing file may contain brackets.
                paths += sorted(glob(path)) if GLOB.search(path) and not os.path.exists(path) else [path]
        return paths

    def cache_stem(self, image: ScannedImage) -> str:
        """Return the path prefix of an image's cache files: next to an image, or in a folder next to its larger file.

        Under `shared_cache_dir`, the subset's `cache_directory`, `cache_dir` and `spare_dir`, each folder of sources
        has a folder of its own, because two may contain files of the same name.
        """
        if self.shared_cache_dir is not None:
            folder, name = os.path.split(os.path.abspath(image.key))
            return os.path.join(self.shared_cache_dir, folder_name(folder), short_digest(name))
        root = image.cache_directory or self.cache_dir
        if root is None and is_remote(image.key):
            self.required_cache_dir("caches of images at URLs")
        return cache_stem_of(image, lambda folder: root or (self.spare_dir if folder in self.unwritable else None))

    def index_places(self, config: SubsetConfig) -> IndexPlaces:
        """Return where the indexes of a subset's folders are."""
        return IndexPlaces(config.cache_directory or self.cache_dir, self.spare_dir, self.keeps_indexes)

    def stem_beside(self, image: ScannedImage) -> str | None:
        """Return the prefix of cache files beside an image whose own are elsewhere, where those of earlier runs and
        other programs are; None without such a place."""
        # What runs share must be what each of them would encode itself.
        is_beside = (self.cache_dir is None and not self.unwritable) or self.shared_cache_dir is not None
        if is_beside or image.cache_directory is not None or is_remote(image.key):
            return None
        return cache_stem_of(image, lambda folder: None)


def cache_stem_of(image: ScannedImage, root_of: Callable[[str], str | None]) -> str:
    """Return the path prefix of an image's cache files; `root_of` maps the folder of its file to the folder that
    replaces it, None if nothing does."""

    def place(folder: str) -> str:
        root = root_of(folder)
        return folder if root is None else os.path.join(root, folder_name(folder))

    shard = "" if image.location is None else image.key.removesuffix(image.location.name).rstrip("/")
    if image.location is not None and shard:
        folder, file = os.path.split(os.path.splitext(shard)[0])
        return os.path.join(place(folder), f"{file}.cache", safe_name(os.path.splitext(image.location.name)[0]))
    stem = os.path.splitext(image.key)[0]
    folder, name = os.path.split(stem)
    if root_of(folder) is None:
        return stem
    # Rows of a Parquet file may have paths that differ in their extension alone.
    return os.path.join(place(folder), name if image.location is None else f"images.cache/{short_digest(image.key)}")


def is_remote(file: str) -> bool:
    """Return True if a name is a URL."""
    return "://" in file


def cache_name(location: ImageLocation) -> str:
    """Return an image's name in the disk cache. It does not depend on the content: readers must compare digests."""
    size, reader = (location.num_bytes, "") if location.reader is None else ("", location.reader.name)
    return f"{strip_secrets(location.file)} {location.start} {size} {reader}"


def count_names(pattern: str) -> int:
    """Return the number of names that `expand_pattern` would list."""
    counts = (
        max(0, int(match["last"]) - int(match["first"]) + 1) if match["first"] else match["choices"].count(",") + 1
        for match in BRACES.finditer(pattern)
    )
    return prod(counts)


def expand_pattern(pattern: str) -> list[str]:
    """Expand `{000..013}`, keeping the number of digits, and `{a,b}` in a pattern."""
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
    return [before + middle + suffix for middle in middles for suffix in expand_pattern(after)]
