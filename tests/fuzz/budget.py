"""How many examples each test of this folder tries, and what all of them hold an action to."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

from library.errors import UserError

SECONDS = 20  # of one case; most take milliseconds
AT_LENGTH = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Examples of each test in the long run, which draws others every time; 0 in the fast one, which repeats itself."""


def any_input(num_examples: int) -> settings:
    """The settings of a test that tries so many examples in the fast run."""
    return settings(
        max_examples=AT_LENGTH or num_examples,
        deadline=SECONDS * 1000,
        derandomize=not AT_LENGTH,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def works_or_says_why(action: Callable[[], Any]) -> None:
    """Run it; an error must be one of ours and have something to say."""
    try:
        action()
    except UserError as error:
        assert len(str(error)) > 15, repr(error)
