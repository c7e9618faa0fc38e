"""Options that are read and refused, each with what does its work here."""

from library.options.base import Options
from library.options.no_effect import asks, is_met, is_set


def unsupported(options: Options) -> list[str]:
    """Return a line for every option that asks for what is not done here."""
    values, defaults = options.flat(), type(options).defaults()
    return [
        f"--{name} is not supported: {facts.unsupported}"
        for name, facts in type(options).facts().items()
        if facts.unsupported is not None
        and (is_set(values[name], defaults[name]) if facts.needs else asks(values[name]))
        and all(is_met(need, values) for need in facts.needs)
    ]
