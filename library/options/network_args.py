"""The items of --network_args, read without importing a network module."""

import logging
from collections.abc import Sequence

from library.base.errors import error_in

logger = logging.getLogger(__name__)

TRUE_WORDS = ("true", "1", "yes", "y", "on")  # values that mean True


def parse_network_args(items: Sequence[str] | None) -> dict[str, str]:
    """Parse `key=value` items; the last value of a repeated key counts. Raises UserError for an item without `=`."""
    arguments: dict[str, str] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise error_in("--network_args")(
                f"--network_args {item!r} has no '='", "write key=value, such as conv_dim=8"
            )
        if arguments.get(key, value) != value:
            logger.warning("--network_args %s is given twice; %s counts, not %s", key, value, arguments[key])
        arguments[key] = value
    return arguments


def is_switched_on(items: Sequence[str] | None, name: str) -> bool:
    """Return True if the last network argument `name` has a value that means True."""
    values = [item.partition("=")[2] for item in items or [] if item.partition("=")[0] == name]
    return bool(values) and values[-1].strip().lower() in TRUE_WORDS
