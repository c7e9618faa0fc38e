"""Files behind URLs, through fsspec: byte ranges, tried again when the network fails, with no secret in a message."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from library.data.description.schema import without_secrets
from library.data.scanned.images import FileStamp
from library.errors import UserError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

NUM_TRIES = 5
FIRST_WAIT_S = 0.5  # doubled after each try: eight seconds in all
TIMEOUT_S = 60.0  # for one answer; a range of a megabyte takes that on a line of 140 kbit/s
MISSING_STATUSES, REFUSED_STATUSES = (404, 410), (401, 403)  # of HTTP
PACKAGES = {  # protocol -> what pip installs for it
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
    "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
    "oci": "ocifs", "oss": "ossfs", "webdav": "webdav4", "dropbox": "dropboxdrivefs", "gdrive": "gdrivefs",
}  # fmt: skip
MARKS = ("ETag", "etag", "blob_id", "xet_hash", "LastModified", "last_modified", "mtime")  # the surest first
URL = re.compile(r"\w+://[^\s'\"<>)]+")
SIGNED = re.compile(r"(?i)\b((?:x-amz-[\w-]+|signature|token|key|password|secret)=)[^\s&'\"]+")


def open_file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises UserError saying which package is missing, or what is unknown.

    To be called for each access: after a fork, fsspec makes a new one.
    """
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        opened, path = url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol) or (error.name if error.name else "fsspec")
        raise UserError(f"{protocol}:// needs the package {package}: python3 -m pip install {package}") from None
    except ValueError as error:
        raise UserError(f"{without_secrets(url)}: {cleaned(error)}; use s3://, hf://, https:// or a path") from None
    return opened, path


def stamp_of_url(url: str) -> FileStamp:
    """The size of a file and what differs once it is another one. Raises FileNotFoundError, UserError."""

    def ask() -> FileStamp:
        file_system, path = open_file_system(url)
        file_system.invalidate_cache()  # what is listed once is otherwise kept to the end of the process
        info = file_system.info(path, **_limit(file_system))
        if info.get("size") is None:
            raise UserError(f"{without_secrets(url)}: the server does not tell the size, so no part can be asked for")
        return FileStamp(int(info["size"]), next((str(info[name]) for name in MARKS if info.get(name)), ""))

    return tried(ask, url)


def read_url(url: str, start: int, num_bytes: int) -> bytes:
    """Some bytes of a file. Raises UserError naming it where it is gone, ends before, or cannot be reached."""

    def ask() -> bytes:
        file_system, path = open_file_system(url)
        end = start + num_bytes
        content: bytes = file_system.cat_file(path, start=start, end=end, **_limit(file_system))
        return checked_length(url, content, num_bytes)

    try:
        return tried(ask, url)
    except FileNotFoundError:
        raise UserError(f"{without_secrets(url)} is not there any more; put it back, or start again") from None


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
    """Several (URL, first byte, how many) at the same time; None for what failed, which `read_url` then says why."""
    by_protocol: dict[str, list[int]] = {}
    for place, (url, _, _) in enumerate(ranges):
        by_protocol.setdefault(url.partition("://")[0], []).append(place)
    found: list[bytes | None] = [None] * len(ranges)
    for places in by_protocol.values():
        urls = [ranges[place][0] for place in places]
        file_system = open_file_system(urls[0])[0]
        paths = [open_file_system(url)[1] for url in urls]
        starts = [ranges[place][1] for place in places]
        ends = [ranges[place][1] + ranges[place][2] for place in places]
        try:
            limit = _limit(file_system)
            contents: list[Any] = file_system.cat_ranges(paths, starts, ends, on_error="return", **limit)
        except Exception:  # each of them is tried alone next, and says what is wrong
            continue
        for place, content in zip(places, contents, strict=True):
            if isinstance(content, bytes) and len(content) == ranges[place][2]:
                found[place] = content
    return found


def matching_urls(pattern: str) -> list[str]:
    """The files that a pattern with `*` matches, in order."""

    def ask() -> list[str]:
        file_system, path = open_file_system(pattern)
        return [str(file_system.unstrip_protocol(name)) for name in sorted(file_system.glob(path))]

    try:
        return tried(ask, pattern)
    except FileNotFoundError:
        return []


def checked_length(url: str, content: bytes, num_bytes: int) -> bytes:
    """The bytes, if they are as many as were asked for."""
    if len(content) > num_bytes:
        raise UserError(
            f"{without_secrets(url)}: the server sends whole files where a part is asked for; copy the files to a disk "
            "or to a server that answers byte ranges"
        )
    if len(content) < num_bytes:
        raise ConnectionError(f"{len(content)} of {num_bytes} bytes came")
    return content


def tried(ask: Callable[[], Value], url: str) -> Value:
    """The answer of one of a few tries. Raises FileNotFoundError at once, UserError in the end.

    What a person must put right, such as missing rights, is not tried again.
    """
    for number in range(1, NUM_TRIES + 1):
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:
            # Libraries raise kinds of their own for a broken connection, from botocore's to aiohttp's. fsspec's HTTP
            # file system says "not found" whatever the server answered; the answer is the cause.
            answer = error.__cause__ if isinstance(error, FileNotFoundError) else None
            cause = error if answer is None or not type(answer).__module__.startswith("aiohttp") else answer
            if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in MISSING_STATUSES:
                raise FileNotFoundError(without_secrets(url)) from None
            reason = cleaned(cause)
            if is_for_people(cause):
                raise UserError(
                    f"{without_secrets(url)} cannot be read: {reason}; check the address and the credentials"
                ) from None
            if number == NUM_TRIES:
                raise UserError(
                    f"{without_secrets(url)} cannot be read after {NUM_TRIES} tries: {reason}; check the network, and "
                    "start again: what is done is kept"
                ) from None
            wait_s = FIRST_WAIT_S * 2 ** (number - 1)
            logger.warning("%s: %s; trying again in %g s", without_secrets(url), reason, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def is_for_people(error: BaseException) -> bool:
    """Return True if trying again cannot help: missing rights, or redirects without end."""
    is_named = type(error).__name__ == "TooManyRedirects" or "Credentials" in type(error).__name__
    return isinstance(error, PermissionError) or is_named or getattr(error, "status", None) in REFUSED_STATUSES


def cleaned(error: BaseException) -> str:
    """What an error says, in one line and without what URLs in it hold besides host and path."""
    text = " ".join(str(error).split()) or type(error).__name__
    return SIGNED.sub(r"\1…", URL.sub(lambda match: without_secrets(match[0]), text))[:300]


def _limit(file_system: Any) -> dict[str, Any]:
    """Arguments that end waiting for an answer, where a file system knows them."""
    return {"timeout": TIMEOUT_S} if getattr(file_system, "async_impl", False) else {}
