"""The exception whose message is shown to users, with what a program needs of it, and the formatting of lists of names
in such messages."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

Cause = Literal["missing", "unreadable", "wrong value", "does not fit", "needs", "would be lost", "not installed"]
"""What is wrong with a setting or a file. Front ends read it, so values are added and never changed."""


class UserError(ValueError):
    """An error that the user can fix: the message names the option or file, its value and the fix.

    It is raised on purpose, where the value is used. Every other exception is a bug of this program and ends a run with
    its traceback. Programs read the fields and never the text, which may be reworded at any time.
    """

    def __init__(
        self,
        message: str,
        remedy: str | None = None,
        *,
        setting: str | None = None,
        others: Sequence[str] = (),
        path: str | Path | None = None,
        place: str | None = None,
        cause: Cause | None = None,
    ) -> None:
        """`remedy` is what to do, such as "use another file"; the text is `message`, "; " and `remedy`. `setting` is
        the flag ("--vae"), key or argument to change, as the user types it, and `others` are those that it does not
        fit. `path` is the file or folder that is wrong, and `place` where in there."""
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.message, self.remedy, self.place = message, remedy, place
        self.setting, self.others = setting, tuple(others)
        self.path = None if path is None else str(path)
        self.cause: Cause | None = cause or ("wrong value" if setting is not None else None)
        self.file: str | None = None  # that the setting stands in; None for the command line
        self.reason: str | None = None  # the message without its path

    def __reduce__(self) -> Any:
        # Exceptions are copied by calling the class with its text, which fits few of the classes.
        return rebuild, (type(self), str(self), self.__dict__)

    def complete(
        self,
        setting: str | None,
        path: str | Path | None = None,
        *,
        place: str | None = None,
        cause: Cause | None = None,
        file: str | Path | None = None,
    ) -> None:
        """Fill in what the raise did not know. An error of another setting stays as it is, unless `file` says that the
        settings named by deeper raises stand in there."""
        is_same = setting is None or self.setting in (None, setting)
        if file is not None and self.setting not in (None, setting):
            self.file = self.file or str(file)
        if is_same or file is not None:
            self.place = self.place or place
            self.path = self.path or (None if path is None else str(path))
        if is_same:
            self.setting, self.cause = self.setting or setting, self.cause or cause

    def prefixed(self, prefix: str, setting: str | None = None, **fields: Any) -> "UserError":
        """Return an error that says `prefix` before the same message, with its fields, and those of `complete`."""
        error = UserError(prefix + self.message, self.remedy)
        error.setting, error.cause, error.place = self.setting, self.cause, self.place
        error.path, error.file = self.path, self.file
        error.complete(setting, **fields)
        return error


class MakeError(Protocol):
    """Makes an error of a reason and what to do."""

    def __call__(self, reason: str, remedy: str | None = None, /) -> UserError: ...


def about(
    setting: str | None, path: str | Path | None = None, *, kind: type[UserError] = UserError, **fields: Any
) -> MakeError:
    """Return the maker of an error whose message is the setting, the path if there is one, and the reason:
    `raise about("--vae", path)("is a text file", "use a checkpoint")`. A colon may follow the setting in the text."""

    def make(reason: str, remedy: str | None = None, /) -> UserError:
        start = " ".join(str(name) for name in (setting, path) if name is not None)
        message = f"{start}{reason}" if reason[:1] in (":", ",") else f"{start} {reason}".lstrip()
        error = kind(message, remedy, **fields)
        error.complete(setting and setting.removesuffix(":"), path)
        error.cause = error.cause or ("wrong value" if setting is not None else None)
        error.reason = None if path is None else reason + (f"; {remedy}" if remedy else "")
        return error

    return make


def of_file(path: str | Path, **fields: Any) -> MakeError:
    """Return the maker of an error whose message is the path and the reason, which a list of files shows alone."""
    return about(None, path, **fields)


def error_in(setting: str | None = None, **fields: Any) -> MakeError:
    """Return the maker of an error in a setting or a file, which the message names at its own place."""
    return partial(UserError, setting=setting, **fields)


def rebuild(kind: type[UserError], text: str, fields: dict[str, Any]) -> UserError:
    """Return a copied error, whose class may take other arguments than its text."""
    made_by: Any = OSError if issubclass(kind, OSError) else ValueError  # the one of the two that fits its layout
    error: UserError = made_by.__new__(kind, text)
    error.args = (text,)
    error.__dict__.update(fields)
    return error


class NoDataFound(UserError):
    """There are no training images. Front ends search for the start of the message, "No data found"."""

    def __init__(self, reason: str, remedy: str | None = None, **fields: Any) -> None:
        super().__init__(f"No data found: {reason}", remedy, **fields)


class NotThere(UserError):
    """A model's files are missing. Not fatal if all outputs of the model are cached."""

    def __init__(self, message: str, remedy: str | None = None, **fields: Any) -> None:
        super().__init__(message, remedy, **{"cause": "missing", **fields})


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Prefix the message of a NotThere raised in the block with `what`, which needs the model, and raise it as
    UserError."""
    try:
        yield
    except NotThere as error:
        raise error.prefixed(f"{what}: ") from error


@contextmanager
def naming(
    setting: str | None,
    path: str | Path | None = None,
    *,
    place: str | None = None,
    cause: Cause | None = None,
    file: str | Path | None = None,
) -> Iterator[None]:
    """Say of which setting a UserError in the block is that names none; also decorates functions.

    Deeper blocks and raises come first. The message stays as it is.
    """
    try:
        yield
    except UserError as error:
        error.complete(setting, path, place=place, cause=cause, file=file)
        raise


@contextmanager
def flagged(flag: str, path: str | Path | None = None, separator: str = ": ") -> Iterator[None]:
    """Name `flag` in a UserError of the block that has no setting, also at the start of its message."""
    try:
        yield
    except UserError as error:
        if error.setting is not None or not flag:
            raise
        raise error.prefixed(flag + separator, flag, path=path) from error


def reason_of(error: Exception) -> str:
    """Return what is wrong with a file, without its path, for a list that names it."""
    return (isinstance(error, UserError) and error.reason) or str(error).strip()


def list_few(paths: Iterable[str], limit: int = 5, count: int | None = None) -> str:
    """Join the first `limit` paths for a message, and count the rest; `count` is the total if `paths` is incomplete."""
    listed = paths if isinstance(paths, Sequence) else list(paths)
    count = len(listed) if count is None else count
    return ", ".join(listed[:limit]) + (f" and {count - limit} more" if count > limit else "")
