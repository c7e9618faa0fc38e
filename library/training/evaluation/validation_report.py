"""Presents an evaluation as a log line, as values for charts, and as an event."""

import logging
from collections.abc import Sequence
from math import isfinite, isnan, nan

import torch

from library.base.errors import list_few
from library.diffusion.dpo import implicit_accuracy, invert_losses
from library.training.evaluation.choice import average_by_image
from library.training.evaluation.validation_loss import estimate_paired_difference
from library.training.evaluation.validation_record import Evaluation, ValidationRecord
from library.training.reporting import events

logger = logging.getLogger(__name__)


def log_evaluation(
    evaluation: Evaluation,
    before: ValidationRecord,
    levels: Sequence[int],
    labels: Sequence[str],
    title: str = "validation",
    preference: events.Preference | None = None,
) -> None:
    """Log an evaluation in one line, compared with earlier ones, and name images with a non-finite loss."""
    broken_N = ~evaluation.losses_NL.isfinite().all(1)
    if broken_N.any():
        names = list_few(labels[i] for i in broken_N.nonzero().flatten().tolist())
        logger.error("%s after step %d: the loss is not finite for %s", title, evaluation.step, names)
    at_levels = ", ".join(f"{t}: {x:.4f}" for t, x in zip(levels, evaluation.level_means, strict=True))
    when = f"after step {evaluation.step}" if evaluation.step else "before the first step"
    text = f"{title} {when}: loss {evaluation.mean:.4f} on {len(before.images)} images (noise level {at_levels})"
    if preference is not None:
        margin = "not a number" if preference.margin is None else f"{preference.margin:.4g}"
        text += f"; preferred images ahead in {preference.accuracy:.1%}, mean margin {margin}"
    logger.info("%s%s", text, "" if before.first is None else format_comparison(evaluation, before.first, before))


def format_comparison(evaluation: Evaluation, first: Evaluation, before: ValidationRecord) -> str:
    """Compare an evaluation with the first one and with the lowest earlier one."""
    difference = estimate_paired_difference(evaluation.losses_NL, first.losses_NL, before.images)
    error = "" if isnan(difference.standard_error) else f" ± {difference.standard_error:.4f}"
    doubt = "" if difference.is_clear else ", which may be chance"
    direction = "below" if difference.mean < 0 else "above"
    rank = (
        "the lowest so far"
        if evaluation.mean < before.best_loss
        else f"the lowest was {before.best_loss:.4f} after step {before.best_step}"
    )
    return f"; {abs(difference.mean):.4f}{error} {direction} that after step {first.step}{doubt}; {rank}"


def measure_preference(evaluation: Evaluation) -> events.Preference:
    """Return the rate and the mean margin by which preferred images have the higher implicit reward, over pairs and
    levels."""
    losses_NL = evaluation.losses_NL
    return events.Preference(implicit_accuracy(losses_NL), finite(invert_losses(losses_NL).mean().item()))


def detail_values(
    evaluation: Evaluation, record: ValidationRecord, levels: Sequence[int], preference: events.Preference | None = None
) -> dict[str, float]:
    """Return the last evaluation's values for charts, apart from its average."""
    means = zip(levels, evaluation.level_means, strict=True)
    values = {f"loss/validation/level_{level}": mean for level, mean in means}
    if preference is not None:
        values["preference/accuracy"] = preference.accuracy
        values["preference/margin"] = nan if preference.margin is None else preference.margin
    if (difference := record.difference) is not None:
        values["loss/validation/difference"] = difference.mean
        values["loss/validation/difference_error"] = difference.standard_error
    return values


def build_event(
    evaluation: Evaluation, record: ValidationRecord, levels: Sequence[int], preference: events.Preference | None = None
) -> events.Validation:
    zeros_N1 = torch.zeros_like(evaluation.losses_NL)[:, :1]
    # The paired difference to zero has the standard error of the mean itself.
    errors = [
        finite(estimate_paired_difference(losses, zeros_N1, record.images).standard_error)
        for losses in (evaluation.losses_NL, *evaluation.losses_NL.T[:, :, None])
    ]
    by_level = zip(levels, evaluation.level_means, errors[1:], strict=True)
    return events.Validation(
        step=evaluation.step,
        loss=evaluation.mean,
        error=errors[0],
        levels=[events.Level(*level) for level in by_level],
        num_pictures=len(record.images),
        compared=compare_with_first(record),
        best_step=record.best_step,
        best_loss=finite(record.best_loss),
        preference=preference,
        losses=losses_by_digest(evaluation, record),
    )


def losses_by_digest(evaluation: Evaluation, record: ValidationRecord) -> dict[str, float]:
    """Return the loss of each image by the digest of its content; rows of one content are averaged."""
    digests = [str(digest) for digest, *_ in record.images]
    losses_G = average_by_image(evaluation.losses_NL.mean(1), digests)
    return dict(zip(dict.fromkeys(digests), losses_G.tolist(), strict=True))


def compare_with_first(record: ValidationRecord) -> events.Compared | None:
    """Return the last evaluation's difference to the first; None for the first."""
    if (difference := record.difference) is None or record.first is None:
        return None
    error = finite(difference.standard_error)
    return events.Compared(record.first.step, difference.mean, error, difference.is_clear)


def finite(value: float) -> float | None:
    return value if isfinite(value) else None
