"""Which encoding a text that is not UTF-8 is likely to have."""

from library.errors import UserError

COMMON = {
    "utf_16": "UTF-16",
    "cp932": "Shift-JIS (cp932)",
    "cp1252": "Latin-1 (cp1252)",
    "gb18030": "GB18030",
    "cp949": "EUC-KR (cp949)",
    "cp1251": "Cyrillic (cp1251)",
}
"""Encodings that editors still write. Among all that exist a few words fit too many: "café" is cp1250 as well."""


def likely_encoding(content: bytes) -> str | None:
    """Return the encoding that fits best in words; None where none does."""
    from charset_normalizer import from_bytes

    best = from_bytes(content, cp_isolation=list(COMMON)).best()
    return None if best is None else COMMON.get(best.encoding, best.encoding)


def decoded(content: bytes, what: str) -> str:
    """Decode UTF-8, a byte order mark skipped. Raises UserError, beginning with `what`, for other encodings."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {not_utf8(content, error)}") from None


def not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    """Describe where a file cannot be read as UTF-8 and what it may be, to follow its name."""
    likely = likely_encoding(content)
    fits = f"it looks like {likely}" if likely else "no encoding fits"
    return f"is not UTF-8 text: byte {error.start} cannot be read, and {fits}; save it as UTF-8"
