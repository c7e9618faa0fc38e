"""The number of examples per fuzz test, and the check that all of them share."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

from library.base.errors import UserError

SECONDS = 20  # limit of one example; most take milliseconds
AT_LENGTH = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Examples of each test in the long run, which draws others every time; 0 in the fast one, which repeats itself."""


def any_input(num_examples: int) -> settings:
    """Return the settings of a test with this many examples in the fast run."""
    return settings(
        max_examples=AT_LENGTH or num_examples,
        deadline=SECONDS * 1000,
        derandomize=not AT_LENGTH,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def works_or_says_why(action: Callable[[], Any]) -> None:
    """Run the action; the only errors allowed are ours, with a message."""
    try:
        action()
    except UserError as error:
        assert len(str(error)) > 15, repr(error)
