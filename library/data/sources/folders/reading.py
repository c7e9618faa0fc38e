"""Reading of image sizes and caption files with their stamps. No pixels are decoded."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

from library.base.errors import error_in, list_few, reason_of
from library.data.decoding.images import HEAD_BYTES, read_size
from library.data.description.buckets import Size
from library.data.description.captions import CaptionRules
from library.data.scanned.columns import Texts
from library.data.sources.folders.image_headers import plain_size
from library.data.sources.folders.image_index import (
    UNSETTLED,
    compute_stamp,
    compute_stamp_of_image,
    open_index,
    read_stamped,
    update_table,
)
from library.data.sources.storage.index_places import IndexPlaces
from library.options.encodings import NotUtf8, describe_encoding, likely_encoding

MOST_CAPTION_BYTES = 1 << 20  # counting the tokens of ten times as much takes a minute


def check_encodings(folder: str, names: Iterable[str]) -> None:
    """Raise NotUtf8 for all caption files that are not UTF-8, with the likely encoding of each."""
    wrong = []
    for name in names:
        try:
            read_caption(os.path.join(folder, name))
        except NotUtf8 as error:
            wrong.append((name, likely_encoding(read_stamped(os.path.join(folder, name))[1]) or "no encoding fits"))
            first = error
    if len(wrong) == 1:
        raise first
    if wrong:
        listed = list_few([f"{name} ({encoding})" for name, encoding in wrong], 20)
        raise NotUtf8(
            f"{len(wrong)} caption files in {folder} are not UTF-8; save them as UTF-8. Detected encodings: {listed}",
            path=folder,
            cause="unreadable",
        )


def read_caption(path: str) -> tuple[int, str]:
    """Read (stamp, stripped lines) of a caption file. Raises UserError if it cannot be read, NotUtf8 for other
    encodings."""
    try:
        status, content = read_stamped(path)
        if len(content) > MOST_CAPTION_BYTES:
            raise error_in(path=path)(
                f"the caption file {path} has {len(content) / 1e6:.1f} MB, too much for a caption; if it is another "
                "kind of file, move it elsewhere or set another caption_extension"
            )
        text = content.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(f"the caption file {path} {describe_encoding(content, error)}", path=path) from None
    except OSError as error:
        raise error_in(path=path, cause="unreadable")(
            f"the caption file {path} cannot be read: {error.strerror}"
        ) from None
    # All lines are kept, so that one index serves all rules about lines.
    return compute_stamp(status, time.time_ns()), stripped_lines(text.removeprefix("\ufeff"))


def stripped_lines(text: str) -> str:
    """Strip each line of a caption, and remove blank lines at the end."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join([line.strip() for line in lines]).rstrip("\n")


def read_image_size(path: str) -> tuple[int, Size | str]:
    """Return (stamp, size of an image, or the reason why it cannot be read)."""
    try:
        status, head = read_stamped(path, HEAD_BYTES)
        size = plain_size(head, status.st_size) or read_size(path)
    except (ValueError, OSError) as error:
        return UNSETTLED, reason_of(error) or "unknown"
    return compute_stamp_of_image(status, head, time.time_ns()), size


def sizes_anywhere(paths: Sequence[str], places: IndexPlaces, num_threads: int, title: str) -> list[Size | str]:
    """Read the sizes of images in any folders, using and updating the indices of large folders."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_folder[os.path.dirname(path)].append(os.path.basename(path))
    sizes: dict[str, Size | str] = {}
    for folder, names in by_folder.items():
        # Names in the order of the index need no look-up one by one.
        names.sort()
        index = open_index(folder or ".", places)
        table = update_table(index.sizes, folder or ".", names, read_image_size, num_threads, title)
        index.replace_with(table, index.captions)
        sizes.update((os.path.join(folder, name), size) for name, size in zip(names, table.values, strict=True))
    return [sizes[os.path.join(*os.path.split(path))] for path in paths]


def parse_caption(text: str, rules: CaptionRules) -> str:
    """Return the caption from the stripped lines of a file: the first line, all non-blank lines with enable_wildcard,
    or the whole text with enable_multiline_caption."""
    if "\n" not in text or rules.enable_multiline_caption:
        return text
    if rules.enable_wildcard:
        return "\n".join(line for line in text.split("\n") if line)
    return text.partition("\n")[0]


def parse_captions(texts: Sequence[str], rules: CaptionRules) -> Texts:
    """Return the captions from the texts of caption files, as a column."""
    # The column of an index is used as it is, without an object for each caption.
    if isinstance(texts, Texts) and not texts.has_lines:
        return texts
    return Texts.of(parse_caption(text, rules) for text in texts)
