"""Which blocks of a transformer wait in main memory; the base models with a transformer denoiser have this group."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class SwappingOptions(Options):
    """Which blocks of a transformer wait in main memory."""

    blocks_to_swap: int | None = option(
        None,
        help="Number of transformer blocks that wait in main memory and are exchanged with the card's while computing. "
        "Saves the card's memory and costs time.",
    )
