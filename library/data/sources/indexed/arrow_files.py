"""Arrow files of the library datasets: its cache, and what its save_to_disk writes. Each is mapped into memory."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

from library.base.errors import of_file
from library.data.sources.indexed.parquet_files import BATCH_ROWS, Columns, KeptGroups, ParquetRows, leaf_of, values_of


class ArrowRows(ParquetRows):
    """An open Arrow file. A group is a record batch, of which one row is read at a time."""

    def __init__(self, file: io.RawIOBase, label: str, kept: KeptGroups | None = None) -> None:
        """Map the file at the path `label`. Raises UserError if it is not an Arrow stream, or is damaged."""
        import pyarrow as pa

        file.close()
        try:
            with pa.ipc.open_stream(pa.memory_map(label)) as stream:
                self._stream_schema, self._batches = stream.schema, list(stream)
        except (OSError, pa.ArrowException) as error:
            raise of_file(label)(f"is no Arrow file of the library datasets, or is damaged: {error}") from None
        self._keep(label, [batch.num_rows for batch in self._batches], kept)

    @property
    def schema(self) -> Any:
        return self._stream_schema

    @property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def largest_group(self, column: str) -> tuple[int, int]:
        """Return (1, 0): only the row itself is read."""
        return 1, 0

    def batches(self, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        for batch in self._batches:
            for first in range(0, batch.num_rows, BATCH_ROWS):
                rows = batch.slice(first, BATCH_ROWS)
                yield {name: values_of(rows, name) for name in columns}

    def locate_images(self, columns: Columns) -> Columns:
        """Return the columns with that of the images' paths, if the file has paths and no bytes, as folders have."""
        path = f"{columns.image.removesuffix('.bytes')}.path"
        if columns.is_url or not columns.image.endswith(".bytes"):
            return columns
        has_bytes = any(leaf_of(batch, columns.image).null_count < batch.num_rows for batch in self._batches)
        return columns if has_bytes else columns._replace(image=path, is_url=True)

    def _column(self, column: str, group: int) -> Any:
        return leaf_of(self._batches[group], column)
