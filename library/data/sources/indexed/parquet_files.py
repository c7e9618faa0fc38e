"""Parquet files with an image and a caption in each row, as on the Hugging Face Hub.

The smallest readable unit is a column of a row group. On the Hub, `image` is a struct with `bytes` and `path`. The
bytes may also be a column of their own, or a column of URLs may replace them.
"""

import io
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from library.base.errors import about, of_file
from library.environment.packages import import_needed

IMAGE_COLUMNS = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
URL_COLUMNS = ("url", "image_url", "img_url", "URL")
CAPTION_COLUMNS = ("caption", "text", "prompt", "TEXT", "txt", "description")
BATCH_ROWS = 64  # rows read at a time, fewer if large
BATCH_BYTES = 256 << 20
BINARY = re.compile(r"(large_)?binary(_view)?|fixed_size_binary\[\d+\]|dictionary<values=(large_)?binary.*")


def pyarrow_parquet() -> Any:
    """Import the package for Parquet files. Raises UserError saying how to install it."""
    return import_needed("pyarrow.parquet", "parquet", "(and shards)")


class Columns(NamedTuple):
    """The names of the columns with images, captions and references."""

    image: str  # pyarrow's name: `image.bytes` is the field of a struct
    is_url: bool
    caption: str | None
    references: tuple[str, ...] = ()


def first_of(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def find_columns(schema: Any, image: str | None, caption: str | None, references: Sequence[str], label: str) -> Columns:
    """Find the columns of a file: the named ones, or else the first with a usual name; no captions if that name is "".
    Raises UserError that lists the columns."""
    names = list(schema.names)
    listed = f"it has {', '.join(names) or 'none'}"
    requested = (
        ("image_column", image),
        ("caption_column", caption),
        *(("control_columns", reference) for reference in references),
    )
    for key, name in requested:
        if name and name not in names:
            raise about(key)(f"is {name!r}, but {label} has no such column; {listed}")
    image = image or first_of((*IMAGE_COLUMNS, *URL_COLUMNS), names)
    if image is None:
        raise of_file(label)("has no image column with a usual name", f"set image_column, {listed}")
    caption = first_of(CAPTION_COLUMNS, names) if caption is None else caption or None
    if caption is not None and not is_text(schema.field(caption).type):
        raise about("caption_column")(f"{caption!r} of {label} has {schema.field(caption).type}, but must be text")
    reference_columns = tuple(bytes_column(schema, reference) for reference in references)
    for reference, column in zip(references, reference_columns, strict=True):
        if column is None:
            raise about("control_columns")(
                f"{reference!r} of {label} has {schema.field(reference).type}, but must have image bytes"
            )
    column, kind = bytes_column(schema, image), schema.field(image).type
    if column is None and not is_text(kind):
        raise about("image_column")(f"{image!r} of {label} has {kind}, but must have image bytes or URLs")
    if column is None and reference_columns:
        raise about("control_columns")(f": {label} has URLs in {image!r}; references require images in the file too")
    return Columns(column or image, column is None, caption, tuple(filter(None, reference_columns)))


def bytes_column(schema: Any, name: str) -> str | None:
    """Return pyarrow's name of the column that contains the bytes of images; None if it contains none."""
    kind = schema.field(name).type
    if str(kind).startswith("struct<"):
        return next((f"{name}.bytes" for field in kind if field.name == "bytes" and is_binary(field.type)), None)
    return name if is_binary(kind) else None


def is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view") or str(kind).startswith("dictionary<values=string")


def is_binary(kind: Any) -> bool:
    return BINARY.fullmatch(str(kind)) is not None


class KeptGroups:
    """The most recently read row groups of all files, up to a total size. A larger group is kept alone."""

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self.max_bytes = max_bytes
        # For all files together: with a thousand files, a group of 30 MB each would take 30 GB.
        self._values: OrderedDict[tuple[str, str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return sum(values.nbytes for values in self._values.values())

    def get(self, key: tuple[str, str, int]) -> Any:
        """Return the values of (file, column, group), or None."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: tuple[str, str, int], values: Any) -> None:
        with self._lock:
            self._values[key] = values
            while len(self._values) > 1 and self.num_bytes > self.max_bytes:
                self._values.popitem(last=False)


class ParquetRows:
    """An open Parquet file."""

    def __init__(self, file: io.RawIOBase, label: str, kept: KeptGroups | None = None) -> None:
        """Open a Parquet file. Raises UserError if it is not one, or is damaged."""
        parquet = pyarrow_parquet()
        try:
            self._file = parquet.ParquetFile(file, pre_buffer=False)
        except (OSError, ValueError) as error:
            raise of_file(label)(f"is not a Parquet file, or is damaged: {error}") from None
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._keep(label, counts, kept)

    def _keep(self, label: str, counts: Sequence[int], kept: KeptGroups | None) -> None:
        """Prepare reading of groups with these numbers of rows."""
        self.label = label
        self._firsts = list(accumulate(counts, initial=0))[:-1]
        self._kept = kept or KeptGroups()
        self._lock = threading.Lock()

    @property
    def schema(self) -> Any:
        """pyarrow's schema of the columns."""
        return self._file.schema_arrow

    def largest_group(self, column: str) -> tuple[int, int]:
        """Return (rows, bytes) of the largest row group of a column, all of which is read for one image."""
        sizes = [(0, 0)]
        for group in map(self._file.metadata.row_group, range(self._file.num_row_groups)):
            for index in range(group.num_columns):
                if group.column(index).path_in_schema == column:
                    sizes.append((group.num_rows, group.column(index).total_compressed_size))
        return max(sizes, key=lambda pair: pair[1])

    @property
    def num_rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of some columns, a few rows at a time."""
        import pyarrow as pa

        groups = [self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)]
        # pyarrow's arrays cannot hold more than 2 GB of values in one batch.
        row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        num_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
        try:
            for batch in self._file.iter_batches(batch_size=num_rows, columns=list(columns)):
                yield {name: values_of(batch, name) for name in columns}
        except (OSError, pa.ArrowException) as error:
            raise of_file(self.label)(f"is damaged: {error}") from None

    def locate_images(self, columns: Columns) -> Columns:
        """Return the columns as they are read, after a look at their values."""
        return columns

    def value(self, column: str, row: int) -> bytes:
        """Return the bytes in a row of a column. Raises UserError if there are none, because the file was replaced."""
        first, values = self._group(column, row)
        if row - first >= len(values) or not values[row - first].is_valid:
            raise of_file(self.label)(f"has no image in row {row}: it was replaced since the start", "restart the run")
        content: bytes = values[row - first].as_py()
        return content

    def group(self, column: str, row: int) -> Iterator[tuple[int, bytes]]:
        """Yield (row, bytes) of all rows that are read together with a row."""
        first, values = self._group(column, row)
        return ((first + offset, value.as_py()) for offset, value in enumerate(values) if value.is_valid)

    def _group(self, column: str, row: int) -> tuple[int, Any]:
        """Return (first row of the group, its values)."""
        group = bisect_right(self._firsts, row) - 1
        key = self.label, column, group
        # A file must be read by one thread at a time.
        with self._lock:
            values = self._kept.get(key)
            if values is None:
                values = self._column(column, group)
                self._kept.put(key, values)
        return self._firsts[group], values

    def _column(self, column: str, group: int) -> Any:
        import pyarrow as pa

        try:
            return leaf_of(self._file.read_row_group(group, columns=[column], use_threads=False), column)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise of_file(self.label)(f"cannot be read any more: {error}") from None


def leaf_of(table: Any, column: str) -> Any:
    """Return a column, or a field of a struct column."""
    import pyarrow.compute as compute

    name, dot, field = column.partition(".")
    if column in table.schema.names or not dot:
        return table.column(column)
    return compute.struct_field(table.column(name), field)


def values_of(batch: Any, column: str) -> list[Any]:
    values: list[Any] = leaf_of(batch, column).to_pylist()
    return values
