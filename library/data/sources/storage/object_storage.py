"""Access to files at URLs through fsspec: byte ranges, with retries, and without secrets in messages."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from library.base.errors import UserError, naming, of_file
from library.data.description.schema import strip_secrets
from library.data.scanned.images import FileStamp
from library.environment.packages import import_needed

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

NUM_TRIES = 5
FIRST_WAIT_S = 0.5  # doubled after each try: 7.5 seconds in all
TIMEOUT_S = 60.0  # for one response; a megabyte takes this long at 140 kbit/s
MISSING_STATUSES, REFUSED_STATUSES = (404, 410), (401, 403)  # of HTTP
PACKAGES = {  # protocol -> pip package
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
    "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
    "oci": "ocifs", "oss": "ossfs", "webdav": "webdav4", "dropbox": "dropboxdrivefs", "gdrive": "gdrivefs",
}  # fmt: skip
MARKS = ("ETag", "etag", "blob_id", "xet_hash", "LastModified", "last_modified", "mtime")  # most reliable first
# The lookbehinds keep the searches linear: without them every letter of a long word begins a match.
URL = re.compile(r"(?<!\w)\w+://[^\s'\"<>)]+")
SIGNED = re.compile(r"(?i)((?:(?<![\w-])x-amz-[\w-]+|\b(?:signature|token|key|password|secret))=)[^\s&'\"]+")


def open_file_system(url: str) -> tuple[Any, str]:
    """Return (fsspec's file system, the path in it). Raises UserError for a missing package or an unknown protocol.

    Call this for each access, because fsspec creates a new file system after a fork.
    """
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        opened, path = url_to_fs(url)
    except Exception as error:
        with naming(None, strip_secrets(url)):  # a package that is broken raises anything
            import_needed(PACKAGES.get(protocol, "fsspec"), None, f"{protocol}://")
        if not isinstance(error, ValueError):
            raise
        raise of_file(strip_secrets(url))(f": {clean_message(error)}", "use s3://, hf://, https:// or a path") from None
    return opened, path


def stamp_of_url(url: str) -> FileStamp:
    """Return the size of a file and a mark that changes when it is replaced. Raises FileNotFoundError or UserError."""

    def ask() -> FileStamp:
        file_system, path = open_file_system(url)
        file_system.invalidate_cache()  # listings are otherwise kept until the process ends
        info = file_system.info(path, **_limit(file_system))
        if info.get("size") is None:
            raise of_file(strip_secrets(url))(": the server does not report its size, so parts cannot be read")
        # Only one mark: a hub does not report each of them every time, and a stamp of several would change.
        return FileStamp(int(info["size"]), next((str(info[name]) for name in MARKS if info.get(name)), ""))

    return retry(ask, url)


def read_url(url: str, start: int, num_bytes: int) -> bytes:
    """Read a byte range of a file. Raises UserError if the file is missing, too short, or cannot be reached."""

    def ask() -> bytes:
        file_system, path = open_file_system(url)
        end = start + num_bytes
        content: bytes = file_system.cat_file(path, start=start, end=end, **_limit(file_system))
        return check_length(url, content, num_bytes)

    try:
        return retry(ask, url)
    except FileNotFoundError:
        raise of_file(strip_secrets(url))("no longer exists", "restore it, or restart the run") from None


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
    """Read several (URL, first byte, length) concurrently; None for a failure, whose reason `read_url` reports."""
    by_protocol: dict[str, list[int]] = {}
    for index, (url, _, _) in enumerate(ranges):
        by_protocol.setdefault(url.partition("://")[0], []).append(index)
    results: list[bytes | None] = [None] * len(ranges)
    for indices in by_protocol.values():
        urls = [ranges[index][0] for index in indices]
        file_system = open_file_system(urls[0])[0]
        paths = [open_file_system(url)[1] for url in urls]
        starts = [ranges[index][1] for index in indices]
        ends = [ranges[index][1] + ranges[index][2] for index in indices]
        try:
            limit = _limit(file_system)
            contents: list[Any] = file_system.cat_ranges(paths, starts, ends, on_error="return", **limit)
        except Exception:  # each range is then read alone, which reports the error
            continue
        for index, content in zip(indices, contents, strict=True):
            if isinstance(content, bytes) and len(content) == ranges[index][2]:
                results[index] = content
    return results


def list_matching_urls(pattern: str) -> list[str]:
    """Return the URLs that match a pattern with `*`, sorted."""

    def ask() -> list[str]:
        file_system, path = open_file_system(pattern)
        return [str(file_system.unstrip_protocol(name)) for name in sorted(file_system.glob(path))]

    try:
        return retry(ask, pattern)
    except FileNotFoundError:
        return []


def check_length(url: str, content: bytes, num_bytes: int) -> bytes:
    """Return content of the right length. Raises UserError if it is longer, ConnectionError if it is shorter."""
    if len(content) > num_bytes:
        raise of_file(strip_secrets(url))(
            ": the server sends whole files instead of parts",
            "copy the files to a disk or to a server that supports byte ranges",
        )
    if len(content) < num_bytes:
        raise ConnectionError(f"{len(content)} of {num_bytes} bytes were received")
    return content


def retry(ask: Callable[[], Value], url: str) -> Value:
    """Call `ask`, with retries. Raises FileNotFoundError at once, UserError after the last try.

    Errors that need a person, such as missing permissions, are not retried.
    """
    for number in range(1, NUM_TRIES + 1):
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:
            # Libraries raise their own errors for a broken connection, from botocore's to aiohttp's. fsspec's HTTP file
            # system raises FileNotFoundError for any response; the actual error is its cause.
            response_error = error.__cause__ if isinstance(error, FileNotFoundError) else None
            cause = (
                error
                if response_error is None or not type(response_error).__module__.startswith("aiohttp")
                else response_error
            )
            if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in MISSING_STATUSES:
                raise FileNotFoundError(strip_secrets(url)) from None
            reason = clean_message(cause)
            if is_permanent(cause):
                raise of_file(strip_secrets(url))(
                    f"cannot be read: {reason}", "check the address and the credentials"
                ) from None
            if number == NUM_TRIES:
                raise of_file(strip_secrets(url))(
                    f"cannot be read after {NUM_TRIES} tries: {reason}",
                    "check the network, and restart the run: finished work is kept",
                ) from None
            wait_s = FIRST_WAIT_S * 2 ** (number - 1)
            logger.warning("%s: %s; trying again in %g s", strip_secrets(url), reason, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def is_permanent(error: BaseException) -> bool:
    """Return True if a retry cannot help: missing permissions, wrong credentials, or endless redirects."""
    is_named = type(error).__name__ == "TooManyRedirects" or "Credentials" in type(error).__name__
    return isinstance(error, PermissionError) or is_named or getattr(error, "status", None) in REFUSED_STATUSES


def clean_message(error: BaseException) -> str:
    """Return an error's message in one line, with URLs reduced to host and path and without signed parameters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return SIGNED.sub(r"\1…", URL.sub(lambda match: strip_secrets(match[0]), text))[:300]


def _limit(file_system: Any) -> dict[str, Any]:
    """Return the keyword argument that sets a timeout, if the file system supports it."""
    return {"timeout": TIMEOUT_S} if getattr(file_system, "async_impl", False) else {}
