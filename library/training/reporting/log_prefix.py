"""The adapter's label in front of log lines, for runs that train several."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

MARK = "speaks_of"


class Prefix(logging.Filter):
    """A filter that prefixes the lines of one thread with a label."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label, self._thread = label, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        # All handlers get the same record, and each has this filter; the mark keeps the prefix from being repeated.
        if record.thread == self._thread and not hasattr(record, MARK):
            setattr(record, MARK, self._label)
            record.msg = f"{self._label}: {record.msg}"
        return True


@contextmanager
def log_prefix(label: str) -> Iterator[None]:
    """Prefix every line logged inside the block with the label, if there is one."""
    if not label:
        yield
        return
    prefix, handlers = Prefix(label), list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(prefix)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(prefix)
