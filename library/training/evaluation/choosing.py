"""The suggested file as text and as an event, from validation losses of the run or measured later."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from library.formatting import align_columns, format_count
from library.training.evaluation.choice import CONFIDENCE, MIN_IMAGES, Choice, choose, estimate, estimate_of_difference
from library.training.evaluation.validation_record import ValidationRecord
from library.training.reporting import events
from library.training.saving.saved_files import drop_copies, read_num_steps

logger = logging.getLogger(__name__)

TRAINED_ONLY = (
    "no image is set aside, and the loss on trained images falls on and on while they are learned by heart; "
    "--validation_split sets some aside"
)
TOOL = "python3 tools/choose_checkpoint.py"


@dataclass(frozen=True)
class Measured:
    """A file and its loss on each image."""

    file: Path | None  # None for the model before training
    step: int
    losses_G: Tensor
    memorised: events.Memorised | None = None
    forgotten: events.Forgotten | None = None

    @property
    def name(self) -> str:
        return "before training" if self.file is None else self.file.name


def choose_saved(files: Sequence[Path], record: ValidationRecord, measures_what_is_saved: bool) -> events.Choice | None:
    """Compare saved files by the run's own validation, in the order of their steps; log how many it did not measure.

    None if there is nothing to compare, for example if files hold averaged weights but the raw weights were measured.
    """
    if len(files) < 2:
        return None
    files = drop_copies(files)
    found = [(path, read_num_steps(path)) for path in files] if measures_what_is_saved else []
    known = [(path, step) for path, step in found if step and step in record.row_losses]  # 0: unknown
    measured = [Measured(path, step, record.image_losses(step)) for path, step in known]
    if 0 in record.row_losses:
        measured.insert(0, Measured(None, 0, record.image_losses(0)))
    if missing := len(files) - len(known):
        text = "%d of %d saved files were not measured as they are; %s measures them all"
        logger.info(text, missing, len(files), TOOL)
    return choose_measured(measured) if len(known) > 1 else None


def choose_measured(measured: Sequence[Measured], is_held_out: bool = True) -> events.Choice | None:
    """Choose among files in the order of their steps; the model before training comes first.

    None if no loss is finite. No file is suggested with fewer than MIN_IMAGES images, or on training images
    (`is_held_out` False).
    """
    has_base = measured[0].file is None
    found = choose(torch.stack([one.losses_G for one in measured]), int(has_base))
    if found is None:
        return None
    candidates = [
        events.Candidate(
            file=None if one.file is None else str(one.file),
            step=one.step,
            loss=compared.loss.mean,
            low=compared.loss.low,
            high=compared.loss.high,
            difference=compared.to_best.mean,
            difference_low=compared.to_best.low,
            difference_high=compared.to_best.high,
            is_worse=compared.is_worse,
            memorised=one.memorised,
            forgotten=one.forgotten,
        )
        for one, compared in zip(measured, found.files, strict=True)
    ]
    is_enough = found.num_images >= MIN_IMAGES and is_held_out
    return events.Choice(
        suggested=candidates[found.suggested].file if is_enough else None,
        step=candidates[found.suggested].step if is_enough else None,
        has_winner=found.has_winner,
        reason=explain_choice(found, measured) if is_held_out else TRAINED_ONLY,
        num_pictures=found.num_images,
        confidence=CONFIDENCE,
        candidates=candidates,
    )


def explain_choice(found: Choice, measured: Sequence[Measured]) -> str:
    """Explain the choice in a sentence without its full stop."""
    has_base = measured[0].file is None
    files = found.files[int(has_base) :]
    if found.num_images < MIN_IMAGES:
        images = format_count(found.num_images, "image")
        return f"too few images to tell ({images}); set at least {MIN_IMAGES} aside with --validation_split"
    if all(file.is_copy for file in files):
        text = "all files measure the same" if len(files) > 1 else "there is one file"
    elif found.has_winner:
        text = "every other file is significantly worse"
    elif found.suggested == found.best:
        count = sum(not file.is_worse and not file.is_copy for file in files)
        text = (
            "the lowest loss, and no earlier file is within one standard error; not significantly lower than "
            f"{count} other{'' if count == 1 else 's'}"
        )
    else:
        gap, best = found.files[found.suggested].to_best, measured[found.best].name
        text = (
            f"the earliest within one standard error of the lowest loss, that of {best}, which is {gap.mean:.3g} lower "
            f"(standard error {gap.error:.3g})"
        )
    if has_base and not found.files[0].is_worse:
        text += "; no file is significantly better than the model before training"
    return text


def memorised(
    unseen: tuple[Tensor, Tensor], trained: tuple[Tensor, Tensor], kind: Literal["held-out", "mirrored"]
) -> events.Memorised:
    """Estimate how much more the loss fell on training images than on unseen ones; each is (before, after).

    Mirrored copies are compared with their own image. Other images are independent: the errors of both sides add up
    (Welch 1947), with the smaller side's degrees of freedom, which is conservative.
    """
    falls_unseen_G, falls_trained_G = (before - after for before, after in (unseen, trained))
    if kind == "mirrored":
        found = estimate(falls_trained_G - falls_unseen_G)
    else:
        found = estimate_of_difference(falls_trained_G, falls_unseen_G)
    return events.Memorised(found.mean, found.low, found.high, kind)


def forgotten(before_G: Tensor, after_G: Tensor) -> events.Forgotten:
    """Estimate how much the losses of the forgetting probe's images rose."""
    found = estimate(after_G - before_G)
    return events.Forgotten(found.mean, found.low, found.high)


def format_candidates(choice: events.Choice) -> list[str]:
    """Format all files as aligned lines."""
    has_probe = any(one.forgotten is not None for one in choice.candidates)
    heads = ("file", "step", "loss", "difference from best", "significant", "memorization gap")
    rows: list[tuple[str, ...]] = [(*heads, *(("forgetting",) if has_probe else ()))]
    for one in choice.candidates:
        rows.append(
            (
                "before training" if one.file is None else Path(one.file).name,
                str(one.step),
                f"{one.loss:.5f}{format_interval(one.low, one.high)}",
                f"{one.difference:.5f}{format_interval(one.difference_low, one.difference_high)}"
                if one.difference
                else "-",
                "yes" if one.is_worse else "no" if one.difference else "-",
                format_memory(one.memorised),
                *((format_memory(one.forgotten),) if has_probe else ()),
            )
        )
    return align_columns(rows)


def format_memory(memory: events.Memorised | events.Forgotten | None) -> str:
    """Format the memorization gap, or the rise on the forgetting probe."""
    return "" if memory is None else f"{memory.more:.5f}{format_interval(memory.low, memory.high)}"


def memory_line(choice: events.Choice) -> str | None:
    """Describe the memorization of the suggested file, else of the last one; None if it was not measured."""
    files = [one for one in choice.candidates if one.memorised is not None]
    if not files:
        return None
    one = next((one for one in files if one.file == choice.suggested), files[-1])
    memory = one.memorised
    assert memory is not None and one.file is not None
    unseen = "images that were set aside" if memory.unseen == "held-out" else "their mirror images"
    is_clear = memory.low is not None and memory.low > 0
    doubt = "" if is_clear else ", not significant"
    side = "more" if memory.more >= 0 else "less"
    change = (
        f"{abs(memory.more):.5f}{format_interval(memory.low, memory.high)} {side} on trained images than on {unseen}"
    )
    return f"memorization gap: with {Path(one.file).name} the loss fell by {change}{doubt}"


def format_interval(low: float | None, high: float | None) -> str:
    """Format an interval in brackets; "" without one."""
    return "" if low is None or high is None or isnan(low) else f" ({low:.5f} to {high:.5f})"


def format_choice(choice: events.Choice) -> str:
    if choice.suggested is None:
        return f"no file is suggested: {choice.reason}"
    name, images = Path(choice.suggested).name, f"measured on {choice.num_pictures} images"
    return f"suggested file: {name}, step {choice.step}: {choice.reason} ({images})"
