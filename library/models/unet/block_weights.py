"""The blocks of a U-Net in lists of block weights: BASE, IN00 to IN11, MID, OUT00 to OUT11.

BASE is the text encoders; the numbers are those of the blocks in the single-file layout. Shorter lists name only the
blocks with attention, or those that the base model has.
"""

import re

from library.checkpoints.adapter_keys import is_of_text_encoder

BASE, MID = "BASE", "MID"
NUM_SIDE_BLOCKS = 12
SIDES = {"input": "IN", "output": "OUT"}
NUMBERED = re.compile(r"diffusion_model\.(input|output)_blocks\.(\d+)\.")


def side(name: str, *numbers: int) -> tuple[str, ...]:
    """Return the blocks of one side, "IN" or "OUT", by their numbers."""
    return tuple(f"{name}{number:02d}" for number in numbers)


def every_block() -> tuple[str, ...]:
    """Return all 26 blocks in the order of the lists."""
    numbers = range(NUM_SIDE_BLOCKS)
    return (BASE, *side("IN", *numbers), MID, *side("OUT", *numbers))


def block_of(generic: str) -> str | None:
    """Return the block of a module by its generic name; None outside of all blocks, such as for the output layer."""
    if is_of_text_encoder(generic):
        return BASE
    if match := NUMBERED.match(generic):
        return side(SIDES[match[1]], int(match[2]))[0]
    if generic.startswith("diffusion_model.middle_block."):
        return MID
    return "IN00" if generic.startswith(("diffusion_model.time_embed.", "diffusion_model.label_emb.")) else None
