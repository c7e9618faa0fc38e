"""The made-up data source zip: archives of images with caption files of the same name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from zipfile import BadZipFile, ZipFile

from library.base.errors import UserError
from library.data.description.image_extensions import image_extensions
from library.data.description.schema import SubsetConfig, strip_secrets
from library.data.scanned.images import ImageLocation, OpenFiles
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders.reading import stripped_lines
from library.data.sources.indexed.rows import Row, row_of_bytes
from library.data.sources.indexed.scan import SourceFile, scan_files
from library.data.sources.storage.source import Source
from library.data.sources.storage.storage import Storage

KEYS = ("caption_extension",)


@dataclass(frozen=True)
class ZipReader:
    """A reader that unpacks one member at a time."""

    name: str = "zip"

    def read(self, files: OpenFiles, location: ImageLocation) -> bytes:
        return files.kept_open(location.file, lambda: open_archive(files, location.file)).read(location.name)

    def read_group(self, files: OpenFiles, location: ImageLocation) -> Iterator[tuple[int, bytes]]:
        yield location.start, self.read(files, location)


def open_archive(files: OpenFiles, file: str) -> ZipFile:
    """Open an archive. Raises UserError for a file that is not a zip archive."""
    try:
        return ZipFile(files.file(file))
    except BadZipFile as error:
        raise UserError(f"{strip_secrets(file)} is not a zip archive, or is damaged: {error}") from None


def scan(config: SubsetConfig, storage: Storage, num_threads: int) -> ScannedSubset:
    """List the images in the order of the files and their positions."""

    def read_rows(file: SourceFile) -> Sequence[Row]:
        with open_archive(storage, file.path) as archive:
            members = set(archive.namelist())
            rows = []
            for info in archive.infolist():
                path = PurePosixPath(info.filename)
                if path.suffix in image_extensions():
                    beside = str(path.with_suffix(config.caption_extension))
                    caption = stripped_lines(archive.read(beside).decode()) if beside in members else None
                    content = archive.read(info)
                    rows.append(row_of_bytes(info.filename, info.header_offset, content, caption, file.label))
        return rows

    return scan_files(config, storage, num_threads, KEYS, read_rows, lambda file: [ZipReader()])


SOURCE = Source(KEYS, scan)
