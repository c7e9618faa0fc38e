"""Detects the likely encoding of a text that is not UTF-8."""

import re

from library.errors import UserError

COMMON = {
    "utf_16": "UTF-16",
    "cp932": "Shift-JIS (cp932)",
    "cp1252": "Latin-1 (cp1252)",
    "gb18030": "GB18030",
    "cp949": "EUC-KR (cp949)",
    "cp1251": "Cyrillic (cp1251)",
}
"""Encodings that editors still write; with all existing ones a few words fit too many: "café" is valid cp1250 too."""


# An accented letter among plain ones, as in "fille blonde, forêt"; other alphabets fill whole words.
LATIN_WORD = re.compile(rb"[A-Za-z][\xc0-\xff]{1,2}(?![\x80-\xff])|(?<![\x80-\xff])[\xc0-\xff]{1,2}[A-Za-z]")
NOT_LATIN = re.compile(rb"[\x00\x80-\x90\x98-\x9f]|[\xa0-\xff]{3}")


class NotUtf8(UserError):
    """A text file in another encoding."""


def likely_encoding(content: bytes) -> str | None:
    """Return the name of the best fitting encoding; None if none fits."""
    from charset_normalizer import from_bytes

    if LATIN_WORD.search(content) and not NOT_LATIN.search(content):
        return COMMON["cp1252"]

    best = from_bytes(content, cp_isolation=list(COMMON)).best()
    return None if best is None else COMMON.get(best.encoding, best.encoding)


def decode_utf8(content: bytes, what: str) -> str:
    """Decode UTF-8 with or without a byte order mark. Raises UserError, starting with `what`, for other encodings."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8(f"{what} {describe_encoding(content, error)}") from None


def describe_encoding(content: bytes, error: UnicodeDecodeError) -> str:
    """Describe where a file is not UTF-8 and its likely encoding; the text follows the file's name."""
    likely = likely_encoding(content)
    fits = f"it looks like {likely}" if likely else "no encoding fits"
    return f"is not UTF-8 text: byte {error.start} cannot be read, and {fits}; save it as UTF-8"
