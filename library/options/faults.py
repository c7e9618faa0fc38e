"""What happens when something goes wrong, and how to try a run before it starts."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class FaultOptions(Options):
    """What happens when something goes wrong, and how to try a run before it starts."""

    on_nonfinite: str = option(
        "skip",
        help="What to do with a step whose loss or gradient is NaN or infinite: skip leaves the weights as they were "
        "and stops after a handful in a row, stop ends the run at the first one.",
        choices=("skip", "stop"),
    )
    trace_nonfinite: bool = option(
        False,
        help="Compute the first step whose loss or gradient is NaN or infinite once more and name the module that the "
        "damage comes from. Costs nothing before that step.",
    )
    dry_run: bool = option(
        False,
        help="Load and check everything, train the largest batch for one step, show memory, parameters and steps, and "
        "stop without writing a file.",
    )
