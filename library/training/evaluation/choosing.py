"""Which saved file is suggested, in words and as an event, from losses of the run itself or measured afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.training.evaluation.choice import CONFIDENCE, Choice, choose
from library.training.reporting import events

TOOL = "python3 tools/choose_checkpoint.py"


@dataclass(frozen=True)
class Measured:
    """A file and its loss on each picture."""

    file: Path | None  # None is the model that training began with
    step: int
    losses_G: Tensor

    @property
    def name(self) -> str:
        return "before training" if self.file is None else self.file.name


def choice_of(measured: Sequence[Measured]) -> events.Choice | None:
    """What `choose` makes of files in the order of their steps, where what training began with stands first.

    None where no loss is a number; a single picture suggests nothing.
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
        )
        for one, compared in zip(measured, found.files, strict=True)
    ]
    is_told = found.num_pictures > 1
    return events.Choice(
        suggested=candidates[found.suggested].file if is_told else None,
        step=candidates[found.suggested].step if is_told else None,
        has_winner=found.has_winner,
        reason=reason_of(found, measured),
        num_pictures=found.num_pictures,
        confidence=CONFIDENCE,
        candidates=candidates,
    )


def reason_of(found: Choice, measured: Sequence[Measured]) -> str:
    """Why this file, in a sentence without its end."""
    has_base = measured[0].file is None
    files = found.files[int(has_base) :]
    if found.num_pictures < 2:
        return "a single picture tells no difference from chance; set more aside with --validation_split"
    if all(file.is_copy for file in files):
        text = "all files measure the same" if len(files) > 1 else "there is one file"
    elif found.has_winner:
        text = "every other file is worse by more than chance"
    elif found.suggested == found.best:
        count = sum(not file.is_worse and not file.is_copy for file in files)
        text = f"the lowest loss, and every earlier file is worse by more than chance; {count} later ones may not be"
    else:
        gap, best = found.files[found.suggested].to_best, measured[found.best].name
        text = (
            f"the earliest of those that are not clearly worse than the lowest, {best}, which is {gap.mean:.3g} below "
            f"({gap.low:.3g} to {gap.high:.3g}) and may be so by chance"
        )
    if has_base and not found.files[0].is_worse:
        text += "; no file is better than the model before training by more than chance"
    return text


def told_choice(choice: events.Choice) -> str:
    """The suggestion in a line."""
    if choice.suggested is None:
        return f"no file is suggested: {choice.reason}"
    name, pictures = Path(choice.suggested).name, f"measured on {choice.num_pictures} pictures"
    return f"suggested file: {name}, step {choice.step}: {choice.reason} ({pictures})"
