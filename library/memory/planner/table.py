"""Table of candidates for users."""

from collections.abc import Callable, Iterator

from library.base.formatting import columns, format_count, format_gib
from library.memory.planner.choice import ModeChoice
from library.memory.planner.prediction import MemoryMode, ModeCost
from library.memory.planner.selection import fits


def select_shown(choice: ModeChoice) -> tuple[ModeCost, ...]:
    """Return the candidates that fit, or all if none does."""
    fitting = tuple(candidate for candidate in choice.candidates if fits(candidate, choice.gpu))
    return fitting or choice.candidates


def iterate_rows(
    choice: ModeChoice, describe: Callable[[MemoryMode], str], num_passes: int | None = None
) -> Iterator[tuple[str, ...]]:
    """Yield the headings and a row for each shown candidate. `describe` formats a mode as options.

    There is a column for the error if a weight format is used, and one for the hours if `num_passes` is known.
    """
    has_errors = any(candidate.error is not None for candidate in choice.candidates)
    yield (
        *("", "options", "GPU memory", "free", "tensors", "main memory"),
        *(["weight error"] if has_errors else []),
        "batch",
        *(["run"] if num_passes else []),
    )
    for candidate in select_shown(choice):
        yield (
            "->" if candidate is choice.chosen else "" if fits(candidate, choice.gpu) else "x",
            describe(candidate.mode),
            format_gib(candidate.device_bytes),
            format_gib(max(0, choice.gpu.memory_bytes - candidate.device_bytes)),
            format_gib(candidate.tensor_bytes),
            format_gib(candidate.host_bytes) if candidate.host_bytes else "",
            *(["" if candidate.error is None else f"{100 * candidate.error:.1f} %"] if has_errors else []),
            f"{candidate.seconds:.2f} s",
            *([f"{candidate.seconds * num_passes / 3600:.1f} h"] if num_passes else []),
        )


def format_table(choice: ModeChoice, describe: Callable[[MemoryMode], str], num_passes: int | None = None) -> list[str]:
    """Format the shown candidates as aligned lines with the chosen one marked, and count the others."""
    lines = columns([*iterate_rows(choice, describe, num_passes)])
    others = [candidate.device_bytes for candidate in choice.candidates if candidate not in select_shown(choice)]
    if others:
        count = format_count(len(others), "other configuration")
        lines.append(f"too large: {count}; the smallest needs {format_gib(min(others))}")
    return lines
