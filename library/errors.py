"""The one error that is shown to the user as a sentence."""

from collections.abc import Iterator
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
