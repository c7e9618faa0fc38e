"""The error that is shown to users as a sentence, and lists of names in such sentences."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """An error that the user can fix: the message names the option or file, its value and the fix.

    It is raised on purpose, where the value is used. Every other exception is a bug of this program and ends a run with
    its traceback.
    """


class NotThere(UserError):
    """A model's files are missing; a run with all of its outputs cached does not need them."""


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Prefix a missing-files error with what needs the model."""
    try:
        yield
    except NotThere as error:
        raise UserError(f"{what}: {error}") from error


def list_few(paths: Iterable[str], limit: int = 5, count: int | None = None) -> str:
    """List the first few of many for a message; `count` is the total if `paths` is incomplete."""
    listed = paths if isinstance(paths, Sequence) else list(paths)
    count = len(listed) if count is None else count
    return ", ".join(listed[:limit]) + (f" and {count - limit} more" if count > limit else "")
