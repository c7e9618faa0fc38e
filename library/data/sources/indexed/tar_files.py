"""Tar files in the layout of WebDataset: `000001.jpg` with its caption in `000001.txt` or `000001.json`.

Only headers, captions, and the starts and ends of images are read. Names follow POSIX tar, including long names of GNU
and pax. Files that belong together have the same name up to the first dot after the last slash.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from library.base.errors import of_file
from library.base.terminal import escape_controls
from library.data.sources.storage.ranges import Window

BLOCK = 512
LONGEST_NAME = 1 << 16
NAME_ERRORS = "backslashreplace"  # bytes of names that are not UTF-8 become \\xe9, which every file can hold
# str.isdigit accepts ³, and int() refuses more than 4,300 digits.
NUMBER = re.compile(r"[0-9]{1,20}")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    start: int  # of its content
    num_bytes: int

    @property
    def stem(self) -> str:
        """The part of the name that files which belong together share."""
        folder, slash, name = self.name.rpartition("/")
        return f"{folder}{slash}{name.partition('.')[0]}"

    @property
    def ending(self) -> str:
        """The part of the name after the stem, without dot."""
        return self.name.rpartition("/")[2].partition(".")[2]


def iterate_members(window: Window, label: str) -> Iterator[Member]:
    """Yield the regular files of a tar file, in order. Folders and links are skipped.

    Raises UserError if it is not a tar file, is compressed, or ends within a member. `label` is its name in messages.
    """
    if window.file_bytes < BLOCK:
        raise of_file(label)(f"is not a tar file: it has {window.file_bytes} bytes", "check the path or the address")
    position, next_name, next_bytes = 0, None, None
    # An empty block ends the archive, as in Python's tarfile.
    while len(block := window.read(position, BLOCK)) == BLOCK and block.strip(b"\0"):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", NAME_ERRORS)
        except tarfile.HeaderError:
            raise of_file(label)(f"{describe_block_fault(block, position)}") from None
        start = position + BLOCK
        num_bytes = info.size if next_bytes is None else next_bytes
        if num_bytes < 0:
            raise of_file(label)(f"is damaged at byte {position}: a size is negative", "copy it again")
        # These have no content, whatever their size field says.
        if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
            num_bytes = 0
        if start + num_bytes > window.file_bytes:
            raise of_file(label)(
                f"is truncated: {info.name} would end at byte {start + num_bytes}, but the file has "
                f"{window.file_bytes}",
                "copy it again",
            )
        position = start + -(-num_bytes // BLOCK) * BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if num_bytes > LONGEST_NAME:
                raise of_file(label)(f"has a name of {num_bytes} bytes at byte {start}; it is damaged", "rewrite it")
            content = window.read(start, num_bytes)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                next_name = content.rstrip(b"\0").decode("utf-8", NAME_ERRORS)
            else:
                records = pax_records(content, label, start)
                next_name = records.get("path", next_name)
                if not NUMBER.fullmatch(records.get("size", "0")):
                    raise of_file(label)(f"has a damaged header at byte {start}", "rewrite it")
                # This record replaces the size field, whose eleven octal digits end at 8 GB.
                next_bytes = int(records["size"]) if "size" in records else None
            continue
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            # Names reach logs, and control characters could act on the terminal.
            yield Member(escape_controls(next_name or info.name), start, num_bytes)
        elif info.type == tarfile.GNUTYPE_SPARSE:
            raise of_file(label)(f": {info.name} is stored with holes (GNU sparse)", "write the tar file without -S")
        next_name, next_bytes = None, None


def pax_records(content: bytes, label: str, position: int) -> dict[str, str]:
    """Parse the records of an extended header, a sequence of `length key=value` lines."""
    records: dict[str, str] = {}
    remaining = content
    while remaining.strip(b"\0"):
        length, space, _ = remaining.partition(b" ")
        if (
            not space
            or not NUMBER.fullmatch(length.decode("latin-1"))
            or not len(length) + 1 < int(length) <= len(remaining)
        ):
            raise of_file(label)(f"has a damaged header at byte {position}", "rewrite it")
        key, _, value = remaining[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", NAME_ERRORS)
        remaining = remaining[int(length) :]
    return records


def describe_block_fault(block: bytes, position: int) -> str:
    """Describe what is wrong with a block that should be a header."""
    kind = COMPRESSED.get(block[:2])
    if position == 0 and kind is not None:
        return f"is compressed ({kind}), so its images cannot be read one by one; unpack it to .tar"
    return "is not a tar file" if position == 0 else f"is damaged at byte {position}; copy it again"
