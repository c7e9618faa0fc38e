"""The number of examples per fuzz test, and the check that all of them share."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine

from library.base.errors import UserError

SECONDS = 20  # limit of one example; most take milliseconds
Step = tuple[str, dict[str, Any]]
"""A rule of a state machine by name, and its values."""
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


def any_walk(num_examples: int, num_steps: int) -> settings:
    """Return the settings of a state machine with this many walks in the fast run, each of at most `num_steps`.

    Shrinking a failed walk can take many times as long as the walks, so only the long run does so. That one takes ten
    times as many walks of five times as many steps: some minutes for each machine.
    """
    phases = tuple(Phase) if AT_LENGTH else (Phase.generate,)
    num_steps *= 5 if AT_LENGTH else 1
    return settings(
        any_input(num_examples),
        max_examples=min(10 * num_examples, AT_LENGTH or num_examples),
        deadline=None,
        phases=phases,
        stateful_step_count=num_steps,
        report_multiple_bugs=False,
    )


def walk(states: RuleBasedStateMachine, path: Sequence[Step], check: Callable[[], None] = lambda: None) -> None:
    """Walk a path of rules by hand, `check` after each, and end the machine."""
    for name, values in path:
        getattr(states, name)(**values)
        check()
    states.teardown()
