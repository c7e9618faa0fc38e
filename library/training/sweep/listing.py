"""The list of a sweep's runs, for people and for programs that start them."""

from collections.abc import Sequence
from typing import Any

from library.base.formatting import align_columns
from library.base.terminal import print_json, print_line
from library.training.sweep.combinations import Combination
from library.training.sweep.commands import Command


def print_list(form: str, combinations: Sequence[Combination[Any]], commands: Sequence[Command]) -> None:
    """Print the runs by number, as lines or as JSON with the command of each."""
    runs = list(zip(combinations, commands, strict=True))
    if form == "json":
        listed = [
            {
                "number": number,
                "name": combination.options.saving.output_name,
                "label": combination.label,
                "chosen": dict(combination.chosen),
                "command": list(command.words),
            }
            for number, (combination, command) in enumerate(runs, 1)
        ]
        print_json(listed, indent=1)
        return
    rows = [
        (str(number), combination.label, " ".join(f"{name}={text}" for name, text in combination.chosen.items()))
        for number, (combination, _) in enumerate(runs, 1)
    ]
    print_line("\n".join(align_columns(rows)))
