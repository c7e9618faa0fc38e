"""Quantities and names as text."""

from collections.abc import Sequence


def format_gib(num_bytes: int) -> str:
    """Format as GiB (binary units), as GPU memory is counted."""
    return f"{num_bytes / 2**30:.1f} GiB"


def format_bytes(num_bytes: int) -> str:
    """Format as GB, or as MB below one GB (decimal units)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun: `1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, its cells padded to the width of their columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first two columns left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
