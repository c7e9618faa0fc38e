"""Quantities as text."""


def format_bytes(num_bytes: int) -> str:
    """Format as GB, or as MB below one GB (decimal units)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun: `1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
