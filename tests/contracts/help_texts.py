"""What the help of an option must be like."""

import argparse
from collections.abc import Iterable, Iterator


def find_help_problems(actions: Iterable[argparse.Action]) -> Iterator[str]:
    """Yield a sentence for every option whose help front ends cannot show."""
    options_by_text: dict[str, str] = {}
    for action in actions:
        name, text = action.option_strings[0], action.help or ""
        if text in options_by_text:
            yield f"{name} has the help of {options_by_text[text]}: write its own"
        options_by_text[text] = name
        if "/" in text:
            yield f"{name} has a / in its help, before which one front end cuts it: write 'or' or a comma ({text})"
        elif len(text.split()) < 4 or not text.endswith("."):
            yield f"{name} needs a help of four words or more that ends with a full stop ({text})"
