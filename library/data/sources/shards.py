"""The source shards: tar files of images with caption members of the same name (WebDataset)."""

from collections.abc import Sequence

from library.data.description.schema import SubsetConfig
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.indexed.rows import CaptionRule, Row, rows_of_tar
from library.data.sources.indexed.scan import SourceFile, check_packages, scan_files
from library.data.sources.storage.source import Source
from library.data.sources.storage.storage import Storage

KEYS = ("caption_extension", "caption_column")


def scan(config: SubsetConfig, storage: Storage, num_threads: int) -> ScannedSubset:
    """List the images in the order of the files and of their positions in them."""
    rule = CaptionRule(config.caption_extension.removeprefix("."), config.caption_column)

    def read_rows(file: SourceFile) -> Sequence[Row]:
        return rows_of_tar(storage.window(file.path, file.num_bytes), file.label, rule)

    return scan_files(config, storage, num_threads, KEYS, read_rows)


SOURCE = Source(KEYS, scan, check_packages)
