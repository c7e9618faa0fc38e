"""The exception whose message is shown to users, and the formatting of lists of names in such messages."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """An error that the user can fix: the message names the option or file, its value and the fix.

    It is raised on purpose, where the value is used. Every other exception is a bug of this program and ends a run with
    its traceback.
    """


class NoDataFound(UserError):
    """There are no training images. Front ends search for the start of the message, "No data found"."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"No data found: {reason}")


class NotThere(UserError):
    """A model's files are missing. Not fatal if all outputs of the model are cached."""


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Prefix the message of a NotThere raised in the block with `what`, which needs the model, and raise it as
    UserError."""
    try:
        yield
    except NotThere as error:
        raise UserError(f"{what}: {error}") from error


def list_few(paths: Iterable[str], limit: int = 5, count: int | None = None) -> str:
    """Join the first `limit` paths for a message, and count the rest; `count` is the total if `paths` is incomplete."""
    listed = paths if isinstance(paths, Sequence) else list(paths)
    count = len(listed) if count is None else count
    return ", ".join(listed[:limit]) + (f" and {count - limit} more" if count > limit else "")
