"""The suggested file as text and as an event, from validation losses of the run or measured later."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from library.base.formatting import align_columns, format_count
from library.training.evaluation.choice import (
    CONFIDENCE,
    MIN_IMAGES,
    RankedFiles,
    choose,
    estimate,
    estimate_of_difference,
)
from library.training.evaluation.image_scores import Scores
from library.training.evaluation.validation_record import ValidationRecord
from library.training.reporting import events
from library.training.saving.saved_files import drop_copies, read_num_steps

logger = logging.getLogger(__name__)

TRAINED_ONLY = (
    "no images are held out, and the loss on training images keeps falling while they are memorized; hold some out "
    "with --validation_split"
)
TOOL = "python3 tools/choose_checkpoint.py"


@dataclass(frozen=True)
class MeasuredFile:
    """A file and its loss on each image."""

    file: Path | None  # None for the model before training
    step: int
    losses_G: Tensor
    memorised: events.Memorised | None = None
    forgotten: events.Forgotten | None = None

    @property
    def name(self) -> str:
        return "before training" if self.file is None else self.file.name


def choose_saved(
    files: Sequence[Path], record: ValidationRecord, measures_what_is_saved: bool
) -> events.FileChoice | None:
    """Compare saved files by the run's own validation, in the order of their steps; log how many it did not measure.

    None if there is nothing to compare, for example if files hold averaged weights but the raw weights were measured.
    """
    if len(files) < 2:
        return None
    files = drop_copies(files)
    saved = [(path, read_num_steps(path)) for path in files] if measures_what_is_saved else []
    known = [(path, step) for path, step in saved if step and step in record.row_losses]  # 0: unknown
    measured = [MeasuredFile(path, step, record.image_losses(step)) for path, step in known]
    if 0 in record.row_losses:
        measured.insert(0, MeasuredFile(None, 0, record.image_losses(0)))
    if missing := len(files) - len(known):
        text = "%d of %d saved files were not measured as they are; %s measures them all"
        logger.info(text, missing, len(files), TOOL)
    return choose_measured(measured) if len(known) > 1 else None


def choose_measured(measured: Sequence[MeasuredFile], is_held_out: bool = True) -> events.FileChoice | None:
    """Choose among files in the order of their steps; the model before training comes first.

    None if no loss is finite. No file is suggested with fewer than MIN_IMAGES images, or on training images
    (`is_held_out` False).
    """
    has_base = measured[0].file is None
    choice = choose(torch.stack([entry.losses_G for entry in measured]), int(has_base))
    if choice is None:
        return None
    candidates = [
        events.Candidate(
            file=None if entry.file is None else str(entry.file),
            step=entry.step,
            loss=compared.loss.mean,
            low=compared.loss.low,
            high=compared.loss.high,
            difference=compared.to_best.mean,
            difference_low=compared.to_best.low,
            difference_high=compared.to_best.high,
            is_worse=compared.is_worse,
            memorised=entry.memorised,
            forgotten=entry.forgotten,
        )
        for entry, compared in zip(measured, choice.files, strict=True)
    ]
    is_enough = choice.num_images >= MIN_IMAGES and is_held_out
    return events.FileChoice(
        suggested=candidates[choice.suggested].file if is_enough else None,
        step=candidates[choice.suggested].step if is_enough else None,
        has_winner=choice.has_winner,
        reason=explain_choice(choice, measured) if is_held_out else TRAINED_ONLY,
        num_pictures=choice.num_images,
        confidence=CONFIDENCE,
        candidates=candidates,
    )


def add_scores(choice: events.FileChoice, scores_by_file: Sequence[Scores]) -> events.FileChoice:
    """Add the scores of the images that each candidate draws for the same prompts and seeds.

    A score's differences to the file with the lowest loss are estimated image by image, at the level that `choose` uses
    for the losses.
    """
    candidates = choice.candidates
    best = next(i for i, file in enumerate(candidates) if file.file is not None and file.difference == 0)
    level = (1 - CONFIDENCE) / max(1, len(candidates) - 1)

    def compare(values: Sequence[float], best_values: Sequence[float]) -> events.Score:
        values_G, best_G = torch.tensor(values, dtype=torch.float64), torch.tensor(best_values, dtype=torch.float64)
        gap = estimate(values_G - best_G, level)
        return events.Score(values_G.mean().item(), gap.mean, gap.low, gap.high)

    scored = [
        replace(file, scores={name: compare(values, scores_by_file[best][name]) for name, values in scores.items()})
        for file, scores in zip(candidates, scores_by_file, strict=True)
    ]
    return replace(choice, candidates=scored)


def explain_choice(choice: RankedFiles, measured: Sequence[MeasuredFile]) -> str:
    """Explain the choice in a sentence without its full stop."""
    has_base = measured[0].file is None
    files = choice.files[int(has_base) :]
    if choice.num_images < MIN_IMAGES:
        images = format_count(choice.num_images, "image")
        return f"too few images to tell ({images}); set at least {MIN_IMAGES} aside with --validation_split"
    if all(file.is_copy for file in files):
        text = "all files measure the same" if len(files) > 1 else "there is one file"
    elif choice.has_winner:
        text = "every other file is significantly worse"
    elif choice.suggested == choice.best:
        count = sum(not file.is_worse and not file.is_copy for file in files)
        text = (
            "the lowest loss, and no earlier file is within one standard error; not significantly lower than "
            f"{count} other{'' if count == 1 else 's'}"
        )
    else:
        gap, best = choice.files[choice.suggested].to_best, measured[choice.best].name
        text = (
            f"the earliest within one standard error of the lowest loss, that of {best}, which is {gap.mean:.3g} lower "
            f"(standard error {gap.error:.3g})"
        )
    if has_base and not choice.files[0].is_worse:
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
        excess = estimate(falls_trained_G - falls_unseen_G)
    else:
        excess = estimate_of_difference(falls_trained_G, falls_unseen_G)
    return events.Memorised(excess.mean, excess.low, excess.high, kind)


def forgotten(before_G: Tensor, after_G: Tensor) -> events.Forgotten:
    """Estimate how much the losses of the forgetting probe's images rose."""
    rise = estimate(after_G - before_G)
    return events.Forgotten(rise.mean, rise.low, rise.high)


def format_candidates(choice: events.FileChoice) -> list[str]:
    """Format all files as aligned lines."""
    has_probe = any(candidate.forgotten is not None for candidate in choice.candidates)
    heads = ("file", "step", "loss", "difference from best", "significant", "memorization gap")
    rows: list[tuple[str, ...]] = [(*heads, *(("forgetting",) if has_probe else ()))]
    for candidate in choice.candidates:
        rows.append(
            (
                "before training" if candidate.file is None else Path(candidate.file).name,
                str(candidate.step),
                f"{candidate.loss:.5f}{format_interval(candidate.low, candidate.high)}",
                f"{candidate.difference:.5f}{format_interval(candidate.difference_low, candidate.difference_high)}"
                if candidate.difference
                else "-",
                "yes" if candidate.is_worse else "no" if candidate.difference else "-",
                format_memory(candidate.memorised),
                *((format_memory(candidate.forgotten),) if has_probe else ()),
            )
        )
    return align_columns(rows)


def format_scores(choice: events.FileChoice) -> list[str]:
    """Format the scores of all files as aligned lines, each with its difference from the file of the lowest loss."""

    def cell(score: events.Score) -> str:
        if not score.difference:
            return f"{score.mean:.4g}"
        has_interval = score.low is not None and not isnan(score.low)
        interval = f" ({score.low:.2g} to {score.high:.2g})" if has_interval else ""
        return f"{score.mean:.4g}, {score.difference:+.2g}{interval}"

    rows: list[tuple[str, ...]] = [("file", *(choice.candidates[0].scores or {}))]
    for candidate in choice.candidates:
        name = "before training" if candidate.file is None else Path(candidate.file).name
        rows.append((name, *map(cell, (candidate.scores or {}).values())))
    return align_columns(rows)


def format_memory(memory: events.Memorised | events.Forgotten | None) -> str:
    """Format the memorization gap, or the rise on the forgetting probe."""
    return "" if memory is None else f"{memory.more:.5f}{format_interval(memory.low, memory.high)}"


def memory_line(choice: events.FileChoice) -> str | None:
    """Describe the memorization of the suggested file, else of the last one; None if it was not measured."""
    files = [candidate for candidate in choice.candidates if candidate.memorised is not None]
    if not files:
        return None
    candidate = next((candidate for candidate in files if candidate.file == choice.suggested), files[-1])
    memory = candidate.memorised
    assert memory is not None and candidate.file is not None
    unseen = "images that were set aside" if memory.unseen == "held-out" else "their mirror images"
    is_clear = memory.low is not None and memory.low > 0
    doubt = "" if is_clear else ", not significant"
    direction = "more" if memory.more >= 0 else "less"
    change = (
        f"{abs(memory.more):.5f}{format_interval(memory.low, memory.high)} {direction} on trained images than on "
        f"{unseen}"
    )
    return f"memorization gap: with {Path(candidate.file).name} the loss fell by {change}{doubt}"


def format_interval(low: float | None, high: float | None) -> str:
    """Format an interval in brackets; "" without one."""
    return "" if low is None or high is None or isnan(low) else f" ({low:.5f} to {high:.5f})"


def format_choice(choice: events.FileChoice) -> str:
    if choice.suggested is None:
        return f"no file is suggested: {choice.reason}"
    name, images = Path(choice.suggested).name, f"measured on {choice.num_pictures} images"
    return f"suggested file: {name}, step {choice.step}: {choice.reason} ({images})"
