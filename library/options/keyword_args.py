"""Parsing of `key=value` items, and calls with the resulting keywords."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from library.base.errors import about, error_in
from library.base.suggestions import did_you_mean


def read_keyword_args(items: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """Parse items to keywords whose values are Python literals: `betas=0.9,0.99` is a tuple.

    The first `=` ends the key. Raises UserError naming `flag` and the item if it has no key, is not a literal, or
    repeats a key.
    """
    keywords: dict[str, Any] = {}
    for item in items or ():
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not key:
            raise about(flag)(f"{item!r} is not key=value", "write for example weight_decay=0.01")
        if key in keywords:
            raise error_in(f"{flag} {key}")(f"{flag} gives {key} twice", "keep one of them")
        try:
            keywords[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise error_in(f"{flag} {key}")(
                f"{flag} {item!r}: {text!r} is not a Python value; numbers are written plainly, text in quotes "
                f"({key}='...'), switches as True and False, several values as 0.9,0.99"
            ) from None
    return keywords


def call_with_keywords(
    target: Callable[..., Any],
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    flag: str,
    set_elsewhere: Mapping[str, str],
    ours: Mapping[str, Any] | None = None,
) -> Any:
    """Call `target(*positional, **ours, **keywords)`. `keywords` come from the user's `flag` and override `ours`.

    `set_elsewhere` maps parameters that have their own flag to that flag ("" if the trainer sets them). Raises
    UserError for these parameters, for an unknown keyword, naming the accepted ones, and for values that `target`
    refuses.
    """
    name = getattr(target, "__name__", str(target))
    parameters = list(inspect.signature(target).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in keywords:
        if key in set_elsewhere:
            fix = f"use --{set_elsewhere[key]}" if set_elsewhere[key] else "the trainer sets it; leave it out"
            raise about(f"{flag} {key}")(f"does not belong there: {fix}")
        if key not in names and not takes_others:
            known = [n for n in names[len(positional) :] if n not in set_elsewhere]
            reason = f"is unknown to {name}; it accepts {', '.join(known) or 'none'}{did_you_mean(key, known)}"
            raise about(f"{flag} {key}")(reason)
    try:
        return target(*positional, **{**(ours or {}), **keywords})
    # Libraries refuse values with many types of errors: betas=(0.9,) of an optimizer is an IndexError.
    except (TypeError, ValueError, AssertionError, NotImplementedError, LookupError, ArithmeticError) as error:
        settings = ", ".join(f"{key}={value}" for key, value in keywords.items()) or "no arguments"
        raise error_in(flag)(f"{name} refuses its settings ({flag}: {settings}): {error}") from error
