"""Adapter strengths by U-Net block: one list per adapter file (--lbws of the merging commands)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from library.architectures.specs import list_specs
from library.base.errors import about
from library.base.json_text import parse_json
from library.checkpoints.base_model_spec import BaseModelSpec, BlockWeights
from library.options.kinds import is_finite_number
from networks.core.files.adapter_file import AdapterFile

logger = logging.getLogger(__name__)


def help_text() -> str:
    """Return the help text of --lbws, with the list lengths of every base model."""
    lengths = [f"{format_lengths(spec)} for {spec.title}" for spec in list_specs() if spec.block_weights is not None]
    return (
        "a list for each file, such as [1,0,0,1,...]: strength by block, times --ratios, the first number for the text "
        f"encoders; {', '.join(lengths)}"
    )


def format_lengths(spec: BaseModelSpec) -> str:
    """Return the list lengths that a base model accepts, such as "17 or 26"; "none" without block weights."""
    return " or ".join(str(len(names)) for names in spec.block_weights.lists) if spec.block_weights else "none"


@dataclass(frozen=True)
class BlockStrength:
    """Strength of each module of one base model, by block; 1 outside the listed blocks."""

    spec: BaseModelSpec
    by_block: dict[str, float]

    def __call__(self, name: str) -> float:
        block = self.block_of(name)
        return 1.0 if block is None else self.by_block.get(block, 1.0)

    def block_of(self, name: str) -> str | None:
        """Return the block of a module, named in any naming; None if the module is in no block."""
        names, lists = self.spec.names.find(name), self.spec.block_weights
        assert lists is not None
        return None if names is None else lists.block_of(names.generic)


def parse_lists(texts: Sequence[str] | None, num_files: int) -> list[tuple[float, ...]]:
    """Parse the lists of --lbws; return no list if the option is not set.

    Raises UserError unless there is one list per file.
    """
    if not texts:
        return []
    if len(texts) != num_files:
        raise about("--lbws")(
            f"has {len(texts)} lists, but --models {num_files}",
            "use one for each file, in quotes if it contains spaces",
        )
    return [parse_list(text) for text in texts]


def parse_list(text: str) -> tuple[float, ...]:
    """Parse `[1, 0.5]` or `1,0.5`. Raises UserError for anything but finite numbers."""
    try:
        numbers = parse_json(text if text.strip().startswith("[") else f"[{text}]")
    except ValueError:
        numbers = None
    if not isinstance(numbers, list) or not all(map(is_finite_number, numbers)):
        raise about("--lbws")(f'has "{text}", which is not a list of numbers', "write it as [1,0,0.5,...]")
    return tuple(float(value) for value in numbers)


def strength_by_block(file: AdapterFile, spec: BaseModelSpec, numbers: tuple[float, ...]) -> Callable[[str], float]:
    """Return a function that maps a module name to its strength, from one list of --lbws.

    Raises UserError if the base model has no list of this length, or every module gets strength 0. Warns about modules
    outside the listed blocks.
    """
    lists = spec.block_weights
    if lists is None:
        raise about("--lbws")(
            f"names the blocks of a U-Net, but {file.origin} is for {spec.title}, which has none", "remove it"
        )
    names = next((names for names in lists.lists if len(names) == len(numbers)), None)
    if names is None:
        raise about("--lbws")(
            f"has a list of {len(numbers)} numbers, but {file.origin} is for {spec.title}, "
            f"which needs {format_lengths(spec)}"
        )
    # The strength acts on the change. sd-scripts multiplies both factors by it, so that 0.5 acts as 0.25 there.
    strength = BlockStrength(spec, dict(zip(names, numbers, strict=True)))
    if not any(map(strength, file.modules)):
        raise about("--lbws")(f"gives every module of {file.origin} strength 0", "remove the file or use other numbers")
    warn_about_uncovered_modules(file, lists, strength)
    return strength


def warn_about_uncovered_modules(file: AdapterFile, lists: BlockWeights, strength: BlockStrength) -> None:
    """Warn about modules outside the listed blocks, and about numbers for blocks that the base model lacks."""
    blocks = [strength.block_of(name) for name in file.modules]
    uncovered = sorted({block or "outside of all blocks" for block in blocks if block not in strength.by_block})
    if uncovered:
        num_uncovered = sum(block not in strength.by_block for block in blocks)
        logger.warning(
            "--lbws: %d of the %d modules of %s are in no block of a list of %d (%s); they keep --ratios",
            num_uncovered, len(blocks), file.origin, len(strength.by_block), ", ".join(uncovered),
        )  # fmt: skip
    ineffective = [
        block for block, value in strength.by_block.items() if block in lists.missing and value not in (0, 1)
    ]
    if ineffective:
        logger.warning(
            "--lbws: the numbers for %s have no effect: %s lacks these blocks",
            ", ".join(ineffective),
            strength.spec.title,
        )
