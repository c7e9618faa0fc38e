"""Decoding of UTF-8 text, with a guess at the encoding of other text."""

import re

from library.base.errors import UserError

COMMON = {
    "utf_16": "UTF-16",
    "cp932": "Shift-JIS (cp932)",
    "cp1252": "Latin-1 (cp1252)",
    "gb18030": "GB18030",
    "cp949": "EUC-KR (cp949)",
    "cp1251": "Cyrillic (cp1251)",
}
"""Encodings that editors still write. With more candidates, too many fit a few words: "café" is also valid cp1250."""


# An accented letter among plain ones, as in "fille blonde, forêt". In other alphabets all letters of a word are high
# bytes.
LATIN_WORD = re.compile(rb"[A-Za-z][\xc0-\xff]{1,2}(?![\x80-\xff])|(?<![\x80-\xff])[\xc0-\xff]{1,2}[A-Za-z]")
NOT_LATIN = re.compile(rb"[\x00\x80-\x90\x98-\x9f]|[\xa0-\xff]{3}")


class NotUtf8(UserError):
    """A text file in another encoding."""


def likely_encoding(content: bytes) -> str | None:
    """Return the most likely encoding of a text that is not UTF-8; None if none fits."""
    from charset_normalizer import from_bytes

    # Tested before the statistics, which take short Latin-1 texts for Cyrillic.
    if LATIN_WORD.search(content) and not NOT_LATIN.search(content):
        return COMMON["cp1252"]

    best = from_bytes(content, cp_isolation=list(COMMON)).best()
    return None if best is None else COMMON.get(best.encoding, best.encoding)


def decode_utf8(content: bytes, origin: str) -> str:
    """Decode UTF-8 with or without a byte order mark. Raises NotUtf8, a UserError starting with `origin`, for other
    encodings."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8(f"{origin} {describe_encoding(content, error)}") from None


def describe_encoding(content: bytes, error: UnicodeDecodeError) -> str:
    """Return the end of a message that starts with the file's name: the first invalid byte and the likely encoding."""
    likely = likely_encoding(content)
    guess = f"it looks like {likely}" if likely else "no encoding fits"
    return f"is not UTF-8 text: byte {error.start} cannot be read, and {guess}; save it as UTF-8"
