"""Listing of the images in larger files, from their index."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.base.errors import about, error_in, list_few, of_file
from library.data.description.image_extensions import PLUGINS, load_plugin
from library.data.description.schema import SubsetConfig, strip_secrets
from library.data.scanned.columns import Texts
from library.data.scanned.images import FileStamp, ImageLocations, Reader, References, ScannedImages
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders.reading import parse_captions
from library.data.sources.indexed.parquet_files import pyarrow_parquet
from library.data.sources.indexed.parquet_index import IndexedFiles, read_index
from library.data.sources.indexed.rows import Row
from library.data.sources.storage.object_storage import open_file_system
from library.data.sources.storage.storage import Storage, is_remote


@dataclass(frozen=True)
class SourceFile:
    """One of the larger files of a subset."""

    path: str  # or URL
    label: str  # path or URL without secrets, for messages and keys
    num_bytes: int


def scan_files(
    config: SubsetConfig,
    storage: Storage,
    num_threads: int,
    keys: Sequence[str],
    read_rows: Callable[[SourceFile], Sequence[Row]],
    open_readers: Callable[[SourceFile], Sequence[Reader]] = lambda file: (),
    stamp_images: Callable[[Sequence[str]], Sequence[str]] = lambda paths: [""] * len(paths),
) -> ScannedSubset:
    """List the images of larger files, in the order of the files and of their positions in them.

    `read_rows` lists a file that is not indexed. `keys` are the keys of the subset that affect its result.
    `open_readers`, given the first file, returns the reader of the images of all files, followed by those of the
    references; nothing if images are byte ranges. `stamp_images`, given the paths of the files, returns for each a text
    that changes with the images outside the file that it names.

    Raises UserError for files that are missing, damaged or of another kind.
    """
    paths, labels, indexed_files = describe_files(config, storage, num_threads, keys, stamp_images)
    files = [
        SourceFile(*file)
        for file in zip(paths, labels, (stamp.num_bytes for stamp in indexed_files.stamps), strict=True)
    ]
    places, folder, title = storage.index_places(config), os.path.dirname(labels[0]), f"indexing {config.base_name}"
    table = read_index(places, folder, indexed_files, lambda number: read_rows(files[number]), num_threads, title)
    subset = convert_rows(table, config, paths, labels, open_readers(files[0]))
    del table
    release_memory()
    return subset


def check_packages(config: SubsetConfig) -> None:
    """Raise UserError for a missing package of the index, or of the protocol of a URL."""
    pyarrow_parquet()
    for pattern in filter(is_remote, config.patterns):
        open_file_system(pattern)


def release_memory() -> None:
    """Release memory that pyarrow keeps for the next table."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def describe_files(
    config: SubsetConfig,
    storage: Storage,
    num_threads: int,
    keys: Sequence[str],
    stamp_images: Callable[[Sequence[str]], Sequence[str]],
) -> tuple[list[str], list[str], IndexedFiles]:
    """Return (the files of a subset, their names in messages, the identity of their index). Raises UserError for
    missing or repeated files."""
    key = config.source_key
    files = [file for pattern in config.patterns for file in storage.matching(pattern)]
    if not files:
        raise about(key)(f"= {config.source!r} matched no files", "check bucket, path and pattern")
    # count() for each file is quadratic, so it runs only if a file is repeated.
    repeated = sorted({file for file in files if files.count(file) > 1}) if len(set(files)) < len(files) else []
    if repeated:
        raise about(key)(f"= {config.source!r} lists a file twice: {list_few(map(strip_secrets, repeated))}")
    if any(map(is_remote, files)):
        storage.required_cache_dir(f"{key} at a URL")
    labels = [strip_secrets(file) for file in files]
    if len(set(labels)) < len(labels):
        alike = sorted({label for label in labels if labels.count(label) > 1})
        raise error_in(key)(
            f"{key} has addresses that differ only in their parameters, which names of images leave out: "
            f"{list_few(alike)}",
            "use addresses with different paths",
        )
    stamps = read_stamps(files, labels, key, storage, num_threads)
    stamps = [stamp._replace(mark=stamp.mark + text) for stamp, text in zip(stamps, stamp_images(files), strict=True)]
    values = {name: getattr(config, name) for name in keys}
    if "caption_extension" in values:
        values["caption_extension"] = config.caption_extension.removeprefix(".")
    plugins = " ".join(filter(load_plugin, PLUGINS))  # an installed plug-in makes more images readable
    folder = os.path.dirname(labels[0])
    # Names relative to the folder, so that a moved folder keeps its index.
    indexed_files = IndexedFiles(
        [name.removeprefix(f"{folder}/") for name in labels], stamps, f"{key} {list(values.values())} {plugins}"
    )
    return files, labels, indexed_files


def read_stamps(
    files: Sequence[str], labels: Sequence[str], key: str, storage: Storage, num_threads: int
) -> list[FileStamp]:
    """Return the stamp of every file. Raises UserError naming the missing ones."""

    def read_stamp(file: str) -> FileStamp | None:
        try:
            return storage.stamp(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise of_file(strip_secrets(file))(f"cannot be read: {error.strerror or error}") from None

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        stamps = list(pool.map(read_stamp, files))
    missing = [name for name, stamp in zip(labels, stamps, strict=True) if stamp is None]
    if missing:
        raise about(key)(f": {len(missing)} of {len(files)} files are missing: {list_few(missing)}")
    return [stamp for stamp in stamps if stamp is not None]


def convert_rows(
    table: Any, config: SubsetConfig, files: Sequence[str], labels: Sequence[str], readers: Sequence[Reader]
) -> ScannedSubset:
    """Convert the rows of an index to images. Raises UserError if only some images have references."""
    import pyarrow.compute as compute

    is_url = bool(compute.any(compute.is_valid(table["url"])).as_py())
    prefixes = [""] * len(labels) if is_url else list(labels)
    problems = table.filter(compute.is_valid(table["problem"])).select(["file", "name", "problem"]).to_pylist()
    dropped = tuple(("/".join(filter(None, (prefixes[row["file"]], row["name"]))), row["problem"]) for row in problems)
    if problems:
        table = table.filter(compute.is_null(table["problem"]))
    is_missing = compute.is_null(table["caption"]).to_numpy()
    captions = copy_texts(compute.fill_null(table["caption"], config.class_tokens or ""))
    images = ScannedImages(
        names=names_of_urls(table) if is_url else copy_texts(table["name"]),
        captions=parse_captions(captions, config.captions),
        sizes_N2=np.stack([numbers(table["width"], np.int32), numbers(table["height"], np.int32)], axis=1),
        locations=ImageLocations(
            tuple(files),
            tuple(prefixes),
            numbers(table["file"], np.int32),
            numbers(table["start"], np.int64),
            numbers(table["num_bytes"], np.int64),
            convert_digests(table["digest"]),
            None if is_url or not readers else readers[0],
            copy_texts(table["url"]) if is_url else None,
        ),
    )
    images = replace(images, references=references_in(table["references"], images, config, readers[1:]))
    is_empty = (images.captions.lengths == 0) & ~is_missing
    return ScannedSubset(
        config,
        images,
        dropped,
        images.keys_at(np.flatnonzero(is_missing)) if is_missing.any() else (),
        images.keys_at(np.flatnonzero(is_empty)) if is_empty.any() else (),
    )


def names_of_urls(table: Any) -> Texts:
    """Return the names of images at URLs: without secrets, and different for different images."""
    columns = (table[name].to_pylist() for name in ("name", "url", "digest"))
    return Texts.of(distinct_name(*row) for row in zip(*columns, strict=True))


def distinct_name(name: str, url: str, digest: bytes) -> str:
    """Return the name of the image at `url`, which begins with a digest of the image if the URL has parameters."""
    if not is_remote(url) or ("?" not in url and "#" not in url):
        return name
    # Parameters are left out of names, although they may be all that tells images apart, as in image?id=7. The digest
    # of a signed URL does not change with its signature.
    folder, _, file = name.rpartition("/")
    return f"{folder}/{digest.hex()[:12]}-{file}"


def references_in(
    column: Any, images: ScannedImages, config: SubsetConfig, readers: Sequence[Reader]
) -> References | None:
    """Convert the references of images; None if there are none. Raises UserError if only some images have any."""
    import pyarrow.compute as compute

    counts = compute.list_value_length(column).to_numpy()
    if not counts.any():
        return None
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        raise of_file(config.source)(
            f": {len(missing)} of {len(images)} images have no reference image: "
            f"{list_few(images.keys_at(missing[:3]), count=len(missing))}",
            "add them, or put these images into files of their own",
        )
    locations = images.locations
    assert locations is not None
    prefixes = [locations.prefixes[file] for file in locations.file_N]
    rows: list[list[dict[str, Any]]] = column.to_pylist()
    placeholder: dict[str, Any] = {"name": "", "start": 0, "num_bytes": 0, "width": 0, "height": 0, "digest": bytes(16)}
    columns = [[row[r] if r < len(row) else placeholder for row in rows] for r in range(counts.max())]
    return References(
        tuple(
            Texts.of(
                p + reference["name"] if reference["name"] else ""
                for p, reference in zip(prefixes, values, strict=True)
            )
            for values in columns
        ),
        np.array(
            [[(reference["width"], reference["height"]) for reference in values] for values in columns], dtype=np.int32
        ).swapaxes(0, 1),
        tuple(
            replace(
                locations,
                start_N=np.array([reference["start"] for reference in values]),
                bytes_N=np.array([reference["num_bytes"] for reference in values]),
                digest_N16=np.array([list(reference["digest"]) for reference in values], dtype=np.uint8),
                reader=readers[r] if readers else None,
            )
            for r, values in enumerate(columns)
        ),
    )


def numbers(column: Any, dtype: type) -> NDArray[Any]:
    """Copy a column of numbers, so that the memory of the table can be freed."""
    return np.array(column.to_numpy(), dtype=dtype)


def copy_texts(column: Any) -> Texts:
    """Copy a column of texts, so that the memory of the table can be freed."""
    import pyarrow as pa

    array = pa.concat_arrays(column.cast(pa.large_string()).chunks or [pa.array([], pa.large_string())])
    _, offsets, content = array.buffers()
    if not len(array):
        return Texts.of(())
    edges = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    all_bytes = np.frombuffer(content if content is not None else b"", dtype=np.uint8)
    return Texts(all_bytes[edges[0] : edges[-1]].copy(), edges[1:] - edges[0])


def convert_digests(column: Any) -> NDArray[np.uint8]:
    """Copy a column of 16-byte digests, shape (N, 16)."""
    import pyarrow as pa

    array = pa.concat_arrays(column.chunks or [pa.array([], pa.binary(16))])
    content: Any = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    digests_N16: NDArray[np.uint8] = content[array.offset * 16 : (array.offset + len(array)) * 16].reshape(-1, 16)
    return np.array(digests_N16)
