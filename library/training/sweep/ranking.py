"""Ranks the runs of a sweep by their loss on the same images with the same noise.

Statistics as in `library.training.evaluation.choice`: paired differences per image, Student's t, and Bonferroni's
correction over all comparisons.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch

from library.base.atomic_files import write_whole
from library.base.formatting import align_columns
from library.checkpoints.overwriting import find_place
from library.training.evaluation.choice import CONFIDENCE, Compared, choose, is_clearly_worse
from library.training.evaluation.choosing import format_interval
from library.training.report_page.comparison import select_shown
from library.training.report_page.page import SWEEP, TITLES, build_page, read_data
from library.training.report_page.writer import read_report
from library.training.reporting.event_stream import plain
from library.training.sweep.worker import Standing

logger = logging.getLogger(__name__)

SCRIPT = "sweep.js"


@dataclass(frozen=True)
class MeasuredAdapter:
    """The validation losses of one adapter, and how it ended."""

    label: str
    step: int  # at which the weights of its file were saved
    losses_G: Sequence[float] | None  # of each held-out image; None if never measured
    ended: str  # why it ended before the others; "" if it did not
    file: str | None  # the file's name; None if no final file was written


@dataclass(frozen=True)
class Ranked:
    """One adapter of the ranking; `compared` is None if it was not measured."""

    measured: MeasuredAdapter
    compared: Compared | None


@dataclass(frozen=True)
class Ranking:
    """All adapters, lowest loss first, unmeasured ones last."""

    rows: Sequence[Ranked]
    num_images: int
    unranked: Sequence[str] = ()  # words of the sweep by which losses are not comparable

    @property
    def verdict(self) -> str:
        """Describe what is statistically significant, as a sentence without its full stop."""
        if self.unranked:
            words = " and ".join(self.unranked)
            return f"nothing is ranked: {words} changes the held-out images or what their losses mean"
        known = [row for row in self.rows if row.compared is not None]
        if not known:
            return "nothing is ranked: no adapter has validation losses; for training on images, set --validation_split"
        if self.num_images < 2:
            return "a single image tells no difference from chance; set more aside with --validation_split"
        best = known[0].measured.label
        rivals = [row.measured.label for row in known[1:] if row.compared is not None and not row.compared.is_worse]
        if not rivals:
            return f"{best} is significantly better than every other adapter"
        return f"{best} has the lowest loss, not significantly lower than {', '.join(rivals)}"


def pair_losses(standings: Sequence[Standing]) -> dict[str, list[float]]:
    """Return the losses of each measured run on the images that all of them have measured, in one order."""
    measured = [standing for standing in standings if standing.losses]
    common = set.intersection(*(set(standing.losses) for standing in measured)) if measured else set()
    # A loss that is not finite is null in JSON.
    return {
        one.label: [nan if (loss := one.losses[digest]) is None else loss for digest in sorted(common)]
        for one in measured
        if common
    }


def rank_standings(standings: Sequence[Standing], unranked: Sequence[str] = ()) -> Ranking:
    """Rank runs by their last validation; `unranked` are words of the sweep that forbid it."""
    losses = {} if unranked else pair_losses(standings)
    measured = [MeasuredAdapter(one.label, one.step, losses.get(one.label), one.ended, one.file) for one in standings]
    return replace(rank(measured), unranked=unranked)


def rank_and_write(
    standings: Sequence[Standing],
    name: str,
    page: Path | None,
    unranked: Sequence[str],
    chosen: Mapping[str, Mapping[str, str]],
    reports: Mapping[str, Path],
) -> list[str]:
    """Rank the runs of a finished sweep and write its page with their charts. Return the lines to log.

    `chosen` maps labels to swept values, `reports` maps labels to reports.
    """
    ranking, title = rank_standings(standings, unranked), TITLES["sweep"] + name
    lines = [*(format_ranking(ranking) if ranking.num_images else ())]
    if page is None:
        return [*lines, f"sweep: {ranking.verdict}"]
    page = find_place(page, SWEEP)
    try:
        write_whole(page, build_page(title, SCRIPT, build_page_data(ranking, title)))
    except OSError as error:
        return [*lines, f"sweep: {ranking.verdict}", f"{page} cannot be written: {error}"]
    add_runs(page, chosen, reports)
    return [*lines, f"sweep: {ranking.verdict}; the ranking is {page}"]


def rank(adapters: Sequence[MeasuredAdapter]) -> Ranking:
    """Rank adapters by their last validation."""
    measured = [adapter for adapter in adapters if adapter.losses_G]
    choice = choose(torch.tensor([adapter.losses_G for adapter in measured], dtype=torch.float64)) if measured else None
    if choice is None:
        return Ranking([Ranked(adapter, None) for adapter in adapters], 0)
    # NaN compares as neither smaller nor larger than a number, so it has a key of its own to come last.
    pairs = sorted(
        zip(measured, choice.files, strict=True), key=lambda pair: (isnan(pair[1].loss.mean), pair[1].loss.mean)
    )
    rows = [Ranked(adapter, compared) for adapter, compared in pairs]
    unmeasured = [Ranked(adapter, None) for adapter in adapters if not adapter.losses_G]
    return Ranking([*rows, *unmeasured], choice.num_images)


def format_ranking(ranking: Ranking) -> list[str]:
    rows = [("", "adapter", "step", "loss", "difference from best", "significant", "")]
    for position, row in enumerate(ranking.rows, 1):
        adapter, compared = row.measured, row.compared
        if compared is None:
            rows.append(("-", adapter.label, str(adapter.step), "-", "-", "-", adapter.ended))
            continue
        loss, gap = compared.loss, compared.to_best
        is_best = row is ranking.rows[0] or compared.is_copy
        rows.append(
            (
                str(position),
                adapter.label,
                str(adapter.step),
                f"{loss.mean:.5f}{format_interval(loss.low, loss.high)}",
                "-" if is_best else f"{gap.mean:.5f}{format_interval(gap.low, gap.high)}",
                "-" if is_best else "yes" if compared.is_worse else "no",
                adapter.ended,
            )
        )
    return align_columns(rows)


def add_runs(page: Path, chosen: Mapping[str, Mapping[str, str]], reports: Mapping[str, Path]) -> None:
    """Add charts, previews and links from the adapters' finished reports to a sweep's page.

    `chosen` maps labels to swept values, `reports` maps labels to reports. A page or report that cannot be read is left
    unchanged, with a warning.
    """
    try:
        data = read_data(page.read_text(encoding="utf-8"))
        runs = [{"label": label, **select_shown(read_report(path))} for label, path in reports.items() if path.exists()]
        names = {label: path.name for label, path in reports.items()}
        data = {**data, "chosen": chosen, "reports": names, "runs": runs}
        write_whole(find_place(page, SWEEP), build_page(str(data.get("title")), SCRIPT, data))
    except (OSError, ValueError) as error:
        logger.warning("%s has no charts: %s", page, error)


def build_page_data(ranking: Ranking, title: str) -> Mapping[str, Any]:
    rows = [
        {
            "label": row.measured.label,
            "step": row.measured.step,
            "ended": row.measured.ended,
            "file": row.measured.file,
            "compared": None if row.compared is None else asdict(row.compared),
        }
        for row in ranking.rows
    ]
    data = {"title": title, "verdict": ranking.verdict, "num_pictures": ranking.num_images, "rows": rows}
    payload: dict[str, Any] = plain({**data, "confidence": CONFIDENCE})
    return payload


def clearly_worse(losses: Mapping[str, Sequence[float]], num_adapters: int, num_looks: int) -> list[str]:
    """Return the labels of adapters that are significantly worse than the best one, or NaN.

    At evaluation number k = `num_looks`, each of the sweep's `num_adapters` adapters is tested at the level 5 % / (k (k
    + 1)), divided by the number of adapters. These levels add up to 5 % over any number of evaluations.
    """
    tensors = {label: torch.tensor(values, dtype=torch.float64) for label, values in losses.items()}
    finite = {label: losses_G for label, losses_G in tensors.items() if bool(losses_G.isfinite().all())}
    if not finite:
        return []
    best = min(finite, key=lambda label: float(finite[label].mean()))
    count = max(1, num_adapters - 1) * num_looks * (num_looks + 1)
    worse = {label for label, losses_G in finite.items() if is_clearly_worse(losses_G, finite[best], count)}
    return [label for label in losses if label in worse or label not in finite]
