"""Batches of prompts instead of images, for training concepts (LECO)."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from library.base.errors import about
from library.base.randomness import random_for
from library.data.batches.validation_set import ValidationSet, make_empty_set
from library.data.concepts.prompts_file import FLAG, PromptPair, read_prompt_pairs
from library.data.description.schema import RunDataConfig
from library.data.plan.audit_values import make_empty_values
from library.options.dataset import DatasetOptions
from library.options.training.concepts import USUAL_GUIDANCE, ConceptOptions
from library.options.training.run import RunOptions
from library.protocols import Architecture, PromptDefaults
from library.types import Batch, Concept, StepOf

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 64
STEP_OF_DRAWN_SIDES = 64
NUM_PREVIEWED = 16  # pairs listed in a file's metadata
PREVIEWED = ("target", "positive", "unconditional", "neutral", "action", "multiplier", "weight")


class Drawn(NamedTuple):
    """The random choices for a batch."""

    pair: PromptPair
    num_denoised: int
    height: int
    width: int
    sizes: tuple[int, ...]  # original height and width, crop top and left, target height and width

    @property
    def num_pixels(self) -> int:
        return self.pair.batch_size * self.height * self.width


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """The pairs of a prompts file, all in turn, reshuffled each time. The run is one epoch.

    Each batch is a function of the seed and its index.
    """

    pairs: Sequence[PromptPair]
    num_steps: int  # denoising steps for a whole image; each batch runs some of them
    guidance: float
    file: str
    seed: int
    num_batches: int
    max_train_steps: int

    config = RunDataConfig((), is_from_file=False)
    num_train_images = num_reg_images = 0
    image_plan = None

    @property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(text for pair in self.pairs for text in pair.texts))

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({pair.batch_size for pair in self.pairs})

    @property
    def own_batches(self) -> "PromptPairs":
        return self

    @property
    def sizes(self) -> "PromptPairs":
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """A description of the pairs that two runs can compare."""
        # `place` names the file, which may be moved.
        texts = repr([{**asdict(pair), "place": ""} for pair in self.pairs])
        return {
            "num_pictures": 0,
            "num_batches": self.num_batches,
            "pictures": "none",
            "captions": blake2b(texts.encode(), digest_size=16).hexdigest(),
            "settings": "prompts alone",
        }

    @property
    def identity_with_contents(self) -> dict[str, Any]:
        return self.identity

    @property
    def image_paths(self) -> list[str]:
        return []

    @property
    def validation(self) -> ValidationSet:
        """An empty set: nothing is held out."""
        return make_empty_set()

    def iterate_epoch(
        self, epoch: int, batch_indices: Sequence[int], step_of: StepOf, num_workers: int, persistent_workers: bool
    ) -> Iterator[Batch]:
        """Yield the batches at `batch_indices`. They are made in this process, on request."""
        return (self._batch(batch_index) for batch_index in batch_indices)

    def audit(self, log: logging.Logger) -> None:
        """Log a summary of the prompt pairs."""
        actions = Counter(pair.action for pair in self.pairs)
        sizes = {f"{p.height}x{p.width}{' and smaller' if p.has_drawn_size else ''}" for p in self.pairs}
        log.info(
            "prompt pairs in %s: %d (%s), with %d different prompts; height x width %s",
            self.file,
            len(self.pairs),
            ", ".join(f"{count} {action}" for action, count in actions.items()),
            len(self.prompts),
            ", ".join(sorted(sizes)),
        )

    def audit_values(self) -> dict[str, Any]:
        """Return the audit values of data without listed images."""
        return make_empty_values()

    def metadata(self, described: DatasetOptions, batches_per_step: int = 1) -> dict[str, Any]:
        """Describe the prompts with sd-scripts' keys."""
        preview = [{name: getattr(pair, name) for name in PREVIEWED} for pair in self.pairs[:NUM_PREVIEWED]]
        return {
            "ss_leco_prompt_count": len(self.pairs),
            "ss_leco_prompts_file": Path(self.file).name,
            "ss_leco_preview": json.dumps(preview, ensure_ascii=False),
            "ss_leco_max_denoising_steps": self.num_steps,
            "ss_leco_denoise_guidance_scale": self.guidance,
        }

    def batch_shapes(self) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
        """Yield (batch size, (image size,)) of each pair; sizes are (width, height) in pixels, the largest if drawn."""
        for pair in self.pairs:
            yield pair.batch_size, ((pair.width, pair.height),)

    def limited_to_largest_batch(self) -> tuple["PromptPairs", int]:
        """Return self and the index of the batch that needs the most memory, and among those the most time."""

        def need(number: int) -> tuple[int, bool, int]:
            drawn = self._drawn(number)
            takes_both_ends = drawn.pair.push != 0  # both ends and the neutral prompt are predicted in one call
            return drawn.num_pixels, takes_both_ends, drawn.num_denoised

        return self, max(range(self.num_batches), key=need)

    def report_skipped(self, log: logging.Logger) -> None:
        """Do nothing: no image is skipped here."""

    def close(self) -> None:
        """Do nothing: there are no worker processes."""

    def _drawn(self, number: int) -> Drawn:
        num_rounds, index = divmod(number, len(self.pairs))
        order = list(range(len(self.pairs)))
        # Every pair comes once before any is repeated; sd-scripts draws with replacement.
        random_for(self.seed, "concept order", num_rounds).shuffle(order)
        pair = self.pairs[order[index]]
        rng = random_for(self.seed, "concept", number)
        # The range is LECO's: at least one step, and never all of them.
        num_denoised = rng.randint(1, self.num_steps - 1)
        height, width = draw_size(pair.height, rng) if pair.has_drawn_size else (pair.height, pair.width)
        sizes = size_conditioning(height, width, rng if pair.dynamic_crops else None)
        return Drawn(pair, num_denoised, height, width, sizes)

    def _batch(self, number: int) -> Batch:
        drawn = self._drawn(number)
        pair, count = drawn.pair, drawn.pair.batch_size
        return Batch(
            keys=[f"{pair.target!r} of {pair.place}"] * count,
            captions=[pair.target] * count,
            pixels_BCHW=None,
            latents_BCHW=None,
            conditioning=None,
            loss_weights_B=torch.full((count,), pair.weight),
            masks_B1HW=None,
            sizes_B6=torch.tensor([drawn.sizes] * count, dtype=torch.float32),
            attributes=[{}] * count,
            concept=Concept(
                positive=pair.positive,
                unconditional=pair.unconditional,
                neutral=pair.neutral,
                push=pair.push,
                multiplier=pair.multiplier,
                num_steps=self.num_steps,
                num_denoised=drawn.num_denoised,
                guidance=self.guidance,
            ),
        )


def draw_size(most: int, rng: Random) -> tuple[int, int]:
    """Draw height and width independently between half of `most` and `most`, as multiples of STEP_OF_DRAWN_SIDES."""
    # Half of the side to the whole side, as in LECO.
    low, high = max(1, most // 2 // STEP_OF_DRAWN_SIDES), max(1, most // STEP_OF_DRAWN_SIDES)
    height, width = (STEP_OF_DRAWN_SIDES * rng.randint(low, high) for _ in range(2))
    return height, width


def size_conditioning(height: int, width: int, rng: Random | None) -> tuple[int, ...]:
    """Return the size conditioning of a whole image, or with `rng` of a random crop from an image up to three times
    as large."""
    if rng is None:
        return height, width, 0, 0, height, width
    # The range is LECO's.
    scale = 1 + 2 * rng.random()
    original = int(height * scale), int(width * scale)
    top, left = (
        rng.randrange(max(1, original_side - side))
        for original_side, side in zip(original, (height, width), strict=True)
    )
    return *original, top, left, height, width


def open_prompt_pairs(
    concepts: ConceptOptions, run: RunOptions, arch: Architecture, seed: int, num_processes: int
) -> PromptPairs:
    """Read the prompts file, and plan the batches that the run needs.

    Raises UserError for an invalid file, or one that does not suit the base model. Warns about truncated prompts.
    """
    assert concepts.prompts_file is not None
    pairs = read_prompt_pairs(Path(concepts.prompts_file))
    step = arch.preview.defaults.size_step
    for pair in pairs:
        check_size(pair, step)
    if ignored_crops := [pair for pair in pairs if pair.dynamic_crops and not arch.tells_sizes]:
        logger.warning(
            "%s %s: dynamic_crops has no effect: the base model has no size input", FLAG, ignored_crops[0].place
        )
    num_batches = run.max_train_steps * run.gradient_accumulation_steps * num_processes
    prompt_pairs = PromptPairs(
        pairs,
        concepts.max_denoising_steps,
        resolve_guidance(concepts, arch.preview.defaults),
        concepts.prompts_file,
        seed,
        num_batches,
        run.max_train_steps,
    )
    for text in prompt_pairs.prompts:
        if (num_tokens := arch.text.count_tokens(text)) > arch.text.max_tokens:
            logger.warning(
                "%s: a prompt has %d tokens, of which only the first %d are used: %s",
                FLAG, num_tokens, arch.text.max_tokens, text,
            )  # fmt: skip
    prompt_pairs.audit(logger)
    return prompt_pairs


def resolve_guidance(concepts: ConceptOptions, defaults: PromptDefaults) -> float:
    """Return the guidance scale for denoising; 1 (none) by default if the base model generates without guidance."""
    if concepts.leco_denoise_guidance_scale is not None:
        return concepts.leco_denoise_guidance_scale
    return USUAL_GUIDANCE if defaults.scale > 1 else 1.0


def check_size(pair: PromptPair, step: int) -> None:
    """Raise UserError for a size that the base model cannot generate."""
    for side in (pair.height, pair.width):
        if side < SMALLEST_SIDE or side % step:
            near = max(SMALLEST_SIDE, side - side % step)
            raise about(FLAG)(
                f"{pair.place}: resolution has a side of {side}",
                f"use {near}, at least {SMALLEST_SIDE} and a multiple of {step}",
            )
