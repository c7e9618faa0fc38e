"""The pictures of tar shards and Parquet files, from their index."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data.description.captions import CaptionRules
from library.data.description.schema import SubsetConfig, without_secrets
from library.data.sources.columns import Texts
from library.data.sources.folders.reading import caption_of
from library.data.sources.images import FileStamp, Pictures, Places
from library.data.sources.names import folder_name, short_digest
from library.data.sources.scanned import ScannedSubset
from library.data.sources.shards.indexing import CaptionRule, Row, row_of, row_of_bytes, rows_of_tar, stripped_lines
from library.data.sources.shards.parquet_index import IndexedFiles, read_index
from library.data.sources.shards.tar_files import Member
from library.data.sources.storage.parquet_files import Columns, ParquetRows, columns_of
from library.data.sources.storage.storage import Storage, is_remote
from library.errors import UserError, few

logger = logging.getLogger(__name__)

NEWLINE = 10
URLS_AT_ONCE = 16
MOST_GROUP_BYTES = 64 << 20  # of rows that are read for one of them, before somebody is told


def collect_indexed(config: SubsetConfig, storage: Storage, num_threads: int) -> ScannedSubset:
    """The pictures of a subset of shards or Parquet files, in the order of the files and of their places in them.

    Raises UserError for files that are missing, damaged or of another kind.
    """
    if config.cache_info:
        logger.warning("cache_info has no effect on %s, whose pictures have an index", config.source)
    files, shown, known = described_files(config, storage, num_threads)
    rule = CaptionRule(config.caption_extension.removeprefix("."), config.caption_column)

    def rows_of(number: int) -> Sequence[Row]:
        if config.shards:
            window = storage.window(files[number], known.stamps[number].num_bytes)
            return rows_of_tar(window, shown[number], rule)
        return rows_of_parquet(files[number], shown[number], config, storage)

    path, title = index_path(shown, known, storage), f"indexing {config.base_name}"
    table = read_index(path, known, rows_of, num_threads, title, config.keeps_index)
    column = ""
    if config.parquet:
        column = columns_of_file(files[0], shown[0], config, storage).image
    found = found_in(table, config, files, shown, column)
    del table
    release_memory()
    return found


def release_memory() -> None:
    """Give back what pyarrow keeps for the next table."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def described_files(
    config: SubsetConfig, storage: Storage, num_threads: int
) -> tuple[list[str], list[str], IndexedFiles]:
    """(the files of a subset, how they are shown, what an index of them must say). Raises UserError."""
    key = "shards" if config.shards else "parquet"
    files = [file for pattern in config.patterns for file in storage.matching(pattern)]
    if not files:
        raise UserError(f"{key} = {config.source!r} matched no files; check bucket, path and pattern")
    twice = sorted({file for file in files if files.count(file) > 1}) if len(set(files)) < len(files) else []
    if twice:
        raise UserError(f"{key} = {config.source!r} names a file twice: {few(map(without_secrets, twice))}")
    if any(map(is_remote, files)):
        storage.required_cache_dir(f"{key} behind a URL")
    shown = [without_secrets(file) for file in files]
    stamps = stamps_of(files, shown, key, storage, num_threads)
    told = [config.image_column, config.caption_column]
    if config.shards:
        told = [config.caption_extension.removeprefix("."), config.caption_column]
    folder = os.path.dirname(shown[0])
    known = IndexedFiles([name.removeprefix(f"{folder}/") for name in shown], stamps, f"{key} {told}")
    return files, shown, known


def stamps_of(
    files: Sequence[str], shown: Sequence[str], key: str, storage: Storage, num_threads: int
) -> list[FileStamp]:
    """The stamp of every file. Raises UserError naming those that are missing."""

    def look(file: str) -> FileStamp | None:
        try:
            return storage.stamp(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{without_secrets(file)} cannot be read: {error.strerror or error}") from None

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        found = list(pool.map(look, files))
    missing = [name for name, stamp in zip(shown, found, strict=True) if stamp is None]
    if missing:
        raise UserError(f"{key}: {len(missing)} of {len(files)} files are not there: {few(missing)}")
    return [stamp for stamp in found if stamp is not None]


def index_path(shown: Sequence[str], files: IndexedFiles, storage: Storage) -> Path:
    """Where the index of these files lies: beside the first, or in --cache_dir. Its name is that of no other set."""
    folder = os.path.dirname(shown[0])
    name = f".picture_index-{short_digest(' '.join([files.rule, *files.names]))[:12]}.parquet"
    if storage.cache_dir is not None:
        return Path(storage.cache_dir, folder_name(folder), name)
    return Path(folder, name)


def columns_of_file(file: str, shown: str, config: SubsetConfig, storage: Storage) -> Columns:
    """The columns of pictures and captions of a Parquet file."""
    return columns_of(ParquetRows(storage.file(file), shown).schema, config.image_column, config.caption_column, shown)


def rows_of_parquet(file: str, shown: str, config: SubsetConfig, storage: Storage) -> list[Row]:
    """The rows of a Parquet file."""
    opened = ParquetRows(storage.file(file), shown)
    columns = columns_of(opened.schema, config.image_column, config.caption_column, shown)
    num_rows, num_bytes = opened.largest_group(columns.image)
    if num_bytes > MOST_GROUP_BYTES and not columns.is_url:
        logger.warning(
            "%s: to read one picture, %d are read (%.0f MB), for a group of rows is the least; tools/make_shards.py "
            "writes tar files, of which each picture is read alone",
            shown,
            num_rows,
            num_bytes / 1e6,
        )
    digits, folder = len(str(opened.num_rows)), os.path.dirname(file)
    rows: list[Row] = []
    with ThreadPoolExecutor(URLS_AT_ONCE, thread_name_prefix="look at URLs") as pool:
        for batch in opened.batches([name for name in (columns.image, columns.caption) if name is not None]):
            images = batch[columns.image]
            captions = [None] * len(images) if columns.caption is None else batch[columns.caption]
            lines = [None if caption is None else stripped_lines(caption) for caption in captions]
            if columns.is_url:
                rows += pool.map(partial(row_of_url, folder=folder, storage=storage), images, lines)
            else:
                for image, caption in zip(images, lines, strict=True):
                    rows.append(row_of_bytes(f"{len(rows):0{digits}}", len(rows), image, caption, shown))
    return rows


def row_of_url(url: str | None, caption: str | None, folder: str, storage: Storage) -> Row:
    """A picture that lies elsewhere: at a URL, or at a path from the folder of the Parquet file on."""
    if not url:
        return Row("?", 0, 0, 0, 0, caption, bytes(16), "has no URL")
    whole = url if is_remote(url) else f"{folder}/{url}" if folder else url
    if is_remote(whole):
        storage.required_cache_dir("pictures behind a URL")
    shown = without_secrets(whole)
    try:
        window = storage.window(whole)
        found = row_of(window, Member(shown, 0, window.file_bytes), "")
    except FileNotFoundError:
        return Row(shown, 0, 0, 0, 0, caption, bytes(16), "is not there", whole)
    except UserError as error:
        return Row(shown, 0, 0, 0, 0, caption, bytes(16), str(error).removeprefix(shown).strip(), whole)
    return found._replace(caption=caption, url=whole)


def found_in(
    table: Any, config: SubsetConfig, files: Sequence[str], shown: Sequence[str], column: str
) -> ScannedSubset:
    """The rows of an index as pictures."""
    import pyarrow.compute as compute

    is_url = bool(compute.any(compute.is_valid(table["url"])).as_py())
    prefixes = [""] * len(shown) if is_url else list(shown)
    problems = table.filter(compute.is_valid(table["problem"])).select(["file", "name", "problem"]).to_pylist()
    dropped = tuple(("/".join(filter(None, (prefixes[row["file"]], row["name"]))), row["problem"]) for row in problems)
    if problems:
        table = table.filter(compute.is_null(table["problem"]))
    is_missing = compute.is_null(table["caption"]).to_numpy()
    captions = texts_of(compute.fill_null(table["caption"], config.class_tokens or ""))
    pictures = Pictures(
        names=texts_of(table["name"]),
        captions=with_rules(captions, config.captions),
        sizes_N2=np.stack([numbers(table["width"], np.int32), numbers(table["height"], np.int32)], axis=1),
        places=Places(
            tuple(files),
            tuple(prefixes),
            numbers(table["file"], np.int32),
            numbers(table["start"], np.int64),
            numbers(table["num_bytes"], np.int64),
            digests_of(table["digest"]),
            "" if is_url else column,
            texts_of(table["url"]) if is_url else None,
        ),
    )
    is_empty = (pictures.captions.lengths == 0) & ~is_missing
    return ScannedSubset(
        config,
        pictures,
        dropped,
        pictures.keys_at(np.flatnonzero(is_missing)) if is_missing.any() else (),
        pictures.keys_at(np.flatnonzero(is_empty)) if is_empty.any() else (),
    )


def with_rules(captions: Texts, rules: CaptionRules) -> Texts:
    """The lines of each caption that count; nothing is to be done where every caption is one line."""
    if not (captions.content == NEWLINE).any():
        return captions
    return Texts.of(caption_of(text, rules) for text in captions)


def numbers(column: Any, dtype: type) -> NDArray[Any]:
    """A column of numbers; the memory of the table may go."""
    return np.array(column.to_numpy(), dtype=dtype)


def texts_of(column: Any) -> Texts:
    """A column of texts, which is one chunk, copied out of the table."""
    import pyarrow as pa

    array = pa.concat_arrays(column.cast(pa.large_string()).chunks or [pa.array([], pa.large_string())])
    _, offsets, content = array.buffers()
    if not len(array):
        return Texts.of(())
    edges = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    whole = np.frombuffer(content if content is not None else b"", dtype=np.uint8)
    return Texts(whole[edges[0] : edges[-1]].copy(), edges[1:] - edges[0])


def digests_of(column: Any) -> NDArray[np.uint8]:
    """A column of digests of 16 bytes, shape (N, 16)."""
    import pyarrow as pa

    array = pa.concat_arrays(column.chunks or [pa.array([], pa.binary(16))])
    content: Any = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    digests_N16: NDArray[np.uint8] = content[array.offset * 16 : (array.offset + len(array)) * 16].reshape(-1, 16)
    return np.array(digests_N16)
