"""The source parquet: Parquet files with an image, or its URL, and a caption in each row."""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import chain, repeat

from library.base.errors import UserError, of_file, reason_of
from library.data.decoding.threads import read_many
from library.data.description.schema import SubsetConfig, strip_secrets
from library.data.scanned.images import ImageLocation, OpenFiles, Reader
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders.reading import MOST_CAPTION_BYTES, stripped_lines
from library.data.sources.indexed.parquet_files import Columns, KeptGroups, ParquetRows, find_columns
from library.data.sources.indexed.rows import Row, build_row, row_of_bytes
from library.data.sources.indexed.scan import SourceFile, check_packages, scan_files
from library.data.sources.indexed.tar_files import Member
from library.data.sources.storage.source import Source
from library.data.sources.storage.storage import Storage, is_remote

logger = logging.getLogger(__name__)

KEYS = ("image_column", "caption_column", "control_columns")
URLS_AT_ONCE = 16
MOST_GROUP_BYTES = 64 << 20  # size of a row group above which a warning is logged


@dataclass(frozen=True)
class ParquetReader:
    """A reader of the images in a column, which reads a whole row group at a time."""

    name: str  # name of the column
    kind: type[ParquetRows] = ParquetRows

    def read(self, files: OpenFiles, location: ImageLocation) -> bytes:
        return self._rows(files, location.file).value(self.name, location.start)

    def read_group(self, files: OpenFiles, location: ImageLocation) -> Iterator[tuple[int, bytes]]:
        return self._rows(files, location.file).group(self.name, location.start)

    def _rows(self, files: OpenFiles, file: str) -> ParquetRows:
        return files.kept_open(file, lambda: self.kind(files.file(file), strip_secrets(file), files.shared(KeptGroups)))


def scan(
    config: SubsetConfig, storage: Storage, num_threads: int, kind: type[ParquetRows] = ParquetRows
) -> ScannedSubset:
    """List the images in the order of the files and their rows; `kind` opens a file."""

    def open_rows(file: str, label: str) -> tuple[ParquetRows, Columns]:
        opened = kind(storage.file(file), label)
        column_keys = config.image_column, config.caption_column, config.control_columns
        return opened, opened.locate_images(find_columns(opened.schema, *column_keys, label))

    def read_rows(file: SourceFile) -> Sequence[Row]:
        return rows_of_parquet(*open_rows(file.path, file.label), os.path.dirname(file.path), storage)

    def open_readers(file: SourceFile) -> list[Reader]:
        columns = open_rows(file.path, file.label)[1]
        return [ParquetReader(name, kind) for name in (columns.image, *columns.references)]

    def stamp_images(paths: Sequence[str]) -> Sequence[str]:
        local = [path for path in paths if not is_remote(path)]
        # The files have the same columns, and opening each would make every start slower.
        if not local or not open_rows(local[0], local[0])[1].is_url:
            return [""] * len(paths)
        return read_many(
            lambda path: "" if is_remote(path) else stamp_of_paths(path, *open_rows(path, path)), paths, num_threads
        )

    return scan_files(config, storage, num_threads, KEYS, read_rows, open_readers, stamp_images)


SOURCE = Source(KEYS, scan, check_packages)


def stamp_of_paths(file: str, opened: ParquetRows, columns: Columns) -> str:
    """Return a digest of size and time of the images that a local Parquet file names by their paths; "" if it names
    none."""
    column, digest, has_paths = columns.image, blake2b(digest_size=16), False
    for batch in opened.batches([column]):
        for path in batch[column]:
            if path and not is_remote(path):
                has_paths = True
                with suppress(OSError):  # its row says that it is missing
                    status = os.stat(os.path.join(os.path.dirname(file), path))
                    digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
                digest.update(b"\0")
    return digest.hexdigest() if has_paths else ""


def rows_of_parquet(opened: ParquetRows, columns: Columns, folder: str, storage: Storage) -> list[Row]:
    """Read the index rows of a file in `folder`."""
    label = opened.label
    num_rows, num_bytes = opened.largest_group(columns.image)
    if num_bytes > MOST_GROUP_BYTES and not columns.is_url:
        logger.warning(
            "%s: reading one image reads %d rows (%.0f MB), because a row group is the smallest unit; "
            "tools/make_shards.py writes tar files, whose images are read one by one",
            label,
            num_rows,
            num_bytes / 1e6,
        )
    digits = len(str(opened.num_rows))
    rows: list[Row] = []
    with ThreadPoolExecutor(URLS_AT_ONCE, thread_name_prefix="look at URLs") as pool:
        column_names = [name for name in (columns.image, columns.caption, *columns.references) if name is not None]
        for batch in opened.batches(column_names):
            images = batch[columns.image]
            captions = [None] * len(images) if columns.caption is None else batch[columns.caption]
            lines = [None if caption is None else caption_lines(caption, label) for caption in captions]
            if columns.is_url:
                rows += pool.map(partial(row_of_url, folder=folder, storage=storage), images, lines)
            else:
                references = zip(*(batch[name] for name in columns.references), strict=True)
                # Not strict, because repeat() never ends.
                for image, caption, row_references in zip(images, lines, chain(references, repeat(())), strict=False):
                    name, number = f"{len(rows):0{digits}}", len(rows)
                    row = row_of_bytes(name, number, image, caption, label)
                    named_references = zip(columns.references, row_references, strict=False)
                    reference_rows = [
                        row_of_bytes(f"{name}.{column}", number, reference, None, label)
                        for column, reference in named_references
                    ]
                    rows.append(row.with_references(reference_rows))
    return rows


def caption_lines(caption: str, label: str) -> str:
    """Return the stripped lines of a caption. Raises UserError for a text that is too long to be one."""
    if len(caption) > MOST_CAPTION_BYTES:
        raise of_file(label)(f"has a caption of {len(caption) / 1e6:.1f} MB; no caption is that long")
    return stripped_lines(caption)


def row_of_url(url: str | None, caption: str | None, folder: str, storage: Storage) -> Row:
    """Return the index row of an image outside the file: at a URL, or at a path relative to the Parquet file."""
    if not url:
        return Row("?", 0, 0, 0, 0, caption, bytes(16), "has no URL")
    location = url if is_remote(url) or os.path.isabs(url) or not folder else f"{folder}/{url}"
    if is_remote(location):
        storage.required_cache_dir("images at URLs")
    label = strip_secrets(location)
    try:
        window = storage.window(location)
        row = build_row(window, Member(label, 0, window.file_bytes), "")
    except FileNotFoundError:
        return Row(label, 0, 0, 0, 0, caption, bytes(16), "does not exist", location)
    except UserError as error:
        return Row(label, 0, 0, 0, 0, caption, bytes(16), reason_of(error), location)
    return row._replace(caption=caption, url=location)
