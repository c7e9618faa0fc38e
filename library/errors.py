"""The one error that is shown to the user as a sentence, and how such a sentence names many things."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Something that the user can put right: the message names the option or file, its value, and the way out.

    It is raised on purpose, at the place that uses the value. Every other exception is a fault of this program and ends
    a run with its traceback.
    """


class NotThere(UserError):
    """Files of a model that are not there. A run that has cached all that the model makes can do without them."""


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Say what it is that needs a model whose files are not there."""
    try:
        yield
    except NotThere as error:
        raise UserError(f"{what}: {error}") from error


def few(paths: Iterable[str], limit: int = 5, count: int | None = None) -> str:
    """The first few of many, for messages; `count` says how many there are where `paths` has not all."""
    listed = paths if isinstance(paths, Sequence) else list(paths)
    count = len(listed) if count is None else count
    return ", ".join(listed[:limit]) + (f" and {count - limit} more" if count > limit else "")
