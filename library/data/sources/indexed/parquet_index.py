"""The index of larger files: a Parquet file with a row for each image, built once.

Its columns are the number of the file and the fields of `rows.Row`. `about` in its metadata lists the files with their
stamps. Only replaced files are indexed again. Each finished file is saved at once, so an interrupted start can
continue. Several processes of a machine wait for the first one to build it.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from library.base.atomic_files import atomic_path
from library.base.errors import of_file
from library.base.json_text import parse_json
from library.base.progress import progress_bar
from library.checkpoints.overwriting import known_by_start, open_lock_file
from library.data.decoding.index_file import read_index_file
from library.data.scanned.images import FileStamp
from library.data.scanned.names import short_digest
from library.data.sources.indexed.parquet_files import pyarrow_parquet
from library.data.sources.indexed.rows import Row
from library.data.sources.storage.index_places import IndexPlaces

logger = logging.getLogger(__name__)

VERSION = 2
ABOUT = b"about"
LOCK = known_by_start("an empty lock file", lambda start: False)


@dataclass(frozen=True)
class IndexedFiles:
    """The larger files of a source, as their index identifies them."""

    names: Sequence[str]  # without secrets
    stamps: Sequence[FileStamp]
    rule: str  # everything else that determines the rows

    @property
    def index_name(self) -> str:
        """The file name of the index, unique to these files."""
        return f".picture_index-{short_digest(' '.join([self.rule, *self.names]))[:12]}.parquet"

    def about(self) -> bytes:
        """Return the metadata of the index."""
        files = [[name, *stamp] for name, stamp in zip(self.names, self.stamps, strict=True)]
        return json.dumps({"version": VERSION, "rule": self.rule, "files": files}).encode()


def schema_of_rows() -> Any:
    """Return pyarrow's schema of an index."""
    import pyarrow as pa

    reference = {
        "name": pa.string(), "start": pa.int64(), "num_bytes": pa.int64(), "width": pa.int32(), "height": pa.int32(),
        "digest": pa.binary(16),
    }  # fmt: skip
    fields = {
        "file": pa.int32(), "name": pa.string(), "start": pa.int64(), "num_bytes": pa.int64(), "width": pa.int32(),
        "height": pa.int32(), "caption": pa.string(), "digest": pa.binary(16), "problem": pa.string(),
        "url": pa.string(), "references": pa.list_(pa.struct(reference)),
    }  # fmt: skip
    return pa.schema(list(fields.items()))


def build_table(rows: Sequence[Row], number: int) -> Any:
    """Return the rows of file `number` as a table."""
    import pyarrow as pa

    row_columns = [[row[i] for row in rows] for i in range(len(Row._fields) - 1)]
    references = [[reference._asdict() for reference in row.references] for row in rows]
    columns = [[number] * len(rows), *row_columns, references]
    schema = schema_of_rows()
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


def read_index(
    places: IndexPlaces,
    folder: str,
    files: IndexedFiles,
    rows_of: Callable[[int], Sequence[Row]],
    num_threads: int,
    title: str,
) -> Any:
    """Return the table of all files, in order. `rows_of(number)` reads a file that is not in the index.

    An unreadable index is rebuilt. It stays in memory if none of the `places` for it can be written.
    """

    def read_known() -> Any:
        tables = (open_index(path, files) for path in places.to_read(folder, files.index_name))
        return next((table for table in tables if table is not None), None)

    index = read_known()
    if index is not None:
        return index
    with ExitStack() as stack:
        path = lock_index(places.to_write(folder, files.index_name), stack)
        if path is not None:
            index = read_known()  # another process may have built it meanwhile
        return make_index(places, folder, files, rows_of, num_threads, title, path) if index is None else index


def lock_index(paths: Sequence[Path], stack: ExitStack) -> Path | None:
    """Lock the first index whose folder can be written, until the stack is closed; None with a warning if there is
    none."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(index_lock(path))
        except (OSError, NotImplementedError) as error:  # filelock below 3.24 raises the latter without flock
            reason = getattr(error, "strerror", error)
        else:
            return path
    if paths:
        message = "%s cannot be written, so every start rebuilds it (%s); set --cache_dir to a writable folder"
        logger.warning(message, paths[0], reason)
    return None


def write_table(table: Any, path: Path) -> None:
    """Write a table atomically. Raises UserError if it cannot be written, for example for lack of space."""
    try:
        with atomic_path(path) as temporary:
            pyarrow_parquet().write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise of_file(path)(f"cannot be written: {error.strerror}", "free space, or set --cache_dir") from None


def open_index(path: Path, files: IndexedFiles) -> Any:
    """Open a valid index; None if it is missing, damaged, or of other files."""
    table = read_index_file(path, lambda path: pyarrow_parquet().read_table(path, memory_map=True))
    if table is None or (table.schema.metadata or {}).get(ABOUT) != files.about():
        return None
    if not is_plausible(table, files):
        logger.warning("%s is damaged and is rebuilt", path)
        return None
    return table


def is_plausible(table: Any, files: IndexedFiles) -> bool:
    """Return True if an index has the right columns and order, and if its images are inside their files."""
    import pyarrow.compute as compute

    if not table.schema.equals(schema_of_rows()):
        return False
    if any(table[name].null_count for name in table.schema.names if name not in ("caption", "problem", "url")):
        return False
    columns = ("file", "start", "num_bytes", "width", "height")
    number, start, num_bytes, width, height = (table[name].to_numpy() for name in columns)
    is_inside = compute.is_valid(table["url"]).to_numpy()  # the size of files at URLs is unknown
    if len(number):
        if number.min() < 0 or number.max() >= len(files.names) or (np.diff(number) < 0).any():
            return False
        # Parquet rows are compressed: `start` is a row number, and the size in the file is unknown.
        is_inside = is_inside | files.rule.startswith("parquet ")
        file_bytes = np.array([stamp.num_bytes for stamp in files.stamps])[number]
        is_inside = is_inside | ((start <= file_bytes) & (num_bytes <= file_bytes - start))
    is_size = ((width > 0) & (height > 0)) | compute.is_valid(table["problem"]).to_numpy()
    return bool(is_inside.all() and is_size.all() and all((column >= 0).all() for column in (start, num_bytes)))


def make_index(
    places: IndexPlaces,
    folder: str,
    files: IndexedFiles,
    rows_of: Callable[[int], Sequence[Row]],
    num_threads: int,
    title: str,
    path: Path | None,
) -> Any:
    """Read the files that are not yet known, `num_threads` at a time, and write the index unless `path` is None."""
    import pyarrow as pa

    parts = None if path is None else path.with_name(f"{path.name}.parts")
    tables: dict[int, Any] = {}
    for older in reversed(places.to_read(folder, files.index_name)):
        tables |= known_tables(older, files)

    def rows_or_part(number: int) -> Any:
        digest = short_digest(f"{VERSION} {files.rule} {files.names[number]} {files.stamps[number]}")
        part = None if parts is None else parts / f"{digest}.parquet"
        if part is not None and (table := open_part(part)) is not None:
            return table
        table = build_table(rows_of(number), number)
        if part is not None:
            write_table(table, part)
        return table

    missing = [number for number in range(len(files.names)) if number not in tables]
    pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="index")
    try:
        with progress_bar(title, len(missing)) as bar:
            for number, table in zip(missing, pool.map(rows_or_part, missing), strict=True):
                tables[number] = with_number(table, number)
                bar.update(1)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    table = pa.concat_tables([tables[number] for number in range(len(files.names))]).combine_chunks()
    table = table.replace_schema_metadata({ABOUT: files.about()})
    if path is not None and parts is not None:
        write_table(table, path)
        shutil.rmtree(parts, ignore_errors=True)
    return table


def known_tables(path: Path, files: IndexedFiles) -> dict[int, Any]:
    """Return the rows of unchanged files from an outdated index, by number of the file."""
    parquet = pyarrow_parquet()
    try:
        table = parquet.read_table(path)
        about = parse_json(table.schema.metadata[ABOUT])
        old_files = {name: (old_number, FileStamp(*stamp)) for old_number, (name, *stamp) in enumerate(about["files"])}
        if (about["version"], about["rule"]) != (VERSION, files.rule):
            return {}
        stamps = [stamp for _, stamp in old_files.values()]
        if not is_plausible(table, IndexedFiles(list(old_files), stamps, files.rule)):
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    edges = np.searchsorted(table["file"].to_numpy(), np.arange(len(old_files) + 1))
    tables: dict[int, Any] = {}
    for number, (name, stamp) in enumerate(zip(files.names, files.stamps, strict=True)):
        old_number, old_stamp = old_files.get(name, (0, None))
        if old_stamp == stamp:
            tables[number] = with_number(
                table.slice(edges[old_number], edges[old_number + 1] - edges[old_number]), number
            )
    return tables


def with_number(table: Any, number: int) -> Any:
    """Return the rows with another number of the file."""
    import pyarrow as pa

    column = pa.array(np.full(len(table), number, dtype=np.int32))
    return table.replace_schema_metadata(None).set_column(0, table.schema.field(0), column)


def open_part(path: Path) -> Any:
    """Open the rows of a file that was finished before an interruption; None if they are missing or damaged."""
    parquet = pyarrow_parquet()
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError):
        return None
    return table if table.schema.equals(schema_of_rows()) else None


@contextmanager
def index_lock(path: Path) -> Iterator[None]:
    """Hold the lock of an index, so that only one process of this machine builds it."""
    from filelock import FileLock

    lock = path.with_name(f"{path.name}.lock")
    open_lock_file(lock, LOCK).close()  # filelock below 3.30 truncates a file before locking it
    with FileLock(lock):
        yield
        with suppress(OSError):  # fails on Windows, where filelock deletes the file itself
            lock.unlink()
