"""Ranks runs by their reports, wherever and whenever they were trained: losses are paired by the content of images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from library.base.errors import error_in
from library.training.report_page.comparison import label_runs
from library.training.report_page.page import ENDING
from library.training.report_page.record import Record
from library.training.report_page.writer import read_report
from library.training.sweep.combinations import RANKED, REFUSED
from library.training.sweep.outcomes import EARLY
from library.training.sweep.ranking import Ranking, pair_losses, rank_standings
from library.training.sweep.worker import Standing

# Options by which losses stay comparable, besides those of the groups in RANKED and REFUSED.
ALIKE = (
    "cache_dir", "seed", "validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "validate_at_first",
    "early_stop_patience", "keep_best_checkpoint", "max_data_loader_n_workers", "persistent_data_loader_workers",
)  # fmt: skip


def rank_reports(folder: Path) -> tuple[Ranking, list[str]]:
    """Rank the runs whose reports are in a folder. Return the ranking, and warnings of what differs between them.

    Raises UserError for fewer than two measured runs, or fewer than two images that all of them have measured.
    """
    paths = sorted(folder.glob(f"*{ENDING}"))
    records = [read_report(path) for path in paths]
    measured = [(path, record) for path, record in zip(paths, records, strict=True) if record.last_losses]
    if len(measured) < 2:
        raise error_in("--rank")(
            f"--rank {folder}: {len(measured)} of its {len(paths)} reports have losses of held-out images; "
            "--validation_split sets images aside"
        )
    labels = label_runs([record for _, record in measured], [path for path, _ in measured])
    standings = [make_standing(label, record) for label, (_, record) in zip(labels, measured, strict=True)]
    if (count := len(next(iter(pair_losses(standings).values()), []))) < 2:
        raise error_in("--rank")(
            f"--rank {folder}: its runs have measured {count} common images, and two are needed",
            "give all of them one --validation_seed and the same images",
        )
    return rank_standings(standings), list(differences([record for _, record in measured]))


def make_standing(label: str, record: Record) -> Standing:
    measured, end = record.last_losses or {}, record.sessions[-1]["end"] if record.sessions else None
    cause = (end or {}).get("cause")
    return Standing(label, measured["step"], measured["step"], measured["losses"], EARLY.get(str(cause), ""), None)


def differences(records: Sequence[Record]) -> Iterator[str]:
    """Yield a warning for each thing by which the losses of runs may not be comparable."""
    steps = [record.last_losses["step"] for record in records if record.last_losses]
    if len(set(steps)) > 1:
        yield f"the runs were measured after different steps: {', '.join(map(str, sorted(set(steps))))}"
    options = [dict(record.sessions[-1]["options"]) if record.sessions else {} for record in records]
    seeds = [o.get("validation_seed", (r.plan or {}).get("seed")) for o, r in zip(options, records, strict=True)]
    if len(set(seeds)) > 1:
        yield "the runs have different validation seeds, so each was measured with other noise; give --validation_seed"
    alike = {name for kind in (*RANKED, *REFUSED) for name in kind.defaults()} | {*ALIKE}
    for name in sorted({name for values in options for name in values} - alike):
        values: list[Any] = [values.get(name) for values in options]
        if any(value != values[0] for value in values):
            yield f"--{name} differs between the runs, by which their losses may mean different things"
