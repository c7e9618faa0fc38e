"""Compares several runs on one page: their differences, their losses on shared axes, their previews side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.base.errors import error_in, of_file
from library.training.report_page.page import ENDING, TITLES, build_page
from library.training.report_page.record import Record
from library.training.report_page.writer import read_events, read_report

SCRIPT = "comparison.js"
NAMES_ONLY = ("output_dir", "output_name", "log_events", "logging_dir", "log_prefix", "config_file", "wandb_run_name")
"""Options that only name files of a run."""
OF_PLAN = ("base_model", "network", "num_trained", "seed", "max_train_steps", "batch_sizes", "accumulation", "pictures",
           "num_processes", "device")  # fmt: skip
MEASURED_AS_SAID = ("validation_split", "validation_seed", "max_validation_steps", "min_timestep", "max_timestep")


def file_of_run(path: Path) -> Path:
    """Find the report in a folder; other paths are returned unchanged. Raises UserError if the folder has none or
    several."""
    if not path.is_dir():
        return path
    reports = sorted(path.glob(f"*{ENDING}"))
    if len(reports) != 1:
        names = ", ".join(file.name for file in reports) or "none"
        raise of_file(path)(f"holds {len(reports)} reports of runs ({names})", "name a report or a file of events")
    return reports[0]


def read_run(path: Path) -> Record:
    """Read a run from a report, an events file, or a folder with one report. Raises UserError if there is none."""
    path = file_of_run(path)
    record = read_report(path) if path.suffix == ".html" else read_events(path)
    if record.plan is None or not record.sessions:
        raise of_file(path)(": that run ended before its training began, there is nothing to compare")
    return record


def label_runs(records: Sequence[Record], paths: Sequence[Path]) -> list[str]:
    """Label each run by its name, with its folder or a number if names clash."""
    names = Counter(record.name for record in records)
    folders = [path if path.is_dir() else path.parent for path in paths]
    labels: list[str] = []
    for record, folder in zip(records, folders, strict=True):
        label = record.name if names[record.name] == 1 else f"{folder.resolve().name}/{record.name}"
        count = sum(other == label or other.startswith(f"{label} (") for other in labels)
        labels.append(f"{label} ({count + 1})" if count else label)
    return labels


def differences(records: Sequence[Record]) -> list[list[Any]]:
    """Return rows of [what, each run's value] that are not equal for all: options, plan, data, versions.

    None is an option at its default, or an unknown value.
    """
    tables = [describe_run(record) for record in records]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [[name, *(table.get(name) for table in tables)] for name in names]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def describe_run(record: Record) -> dict[str, Any]:
    session, plan, audit = record.sessions[-1], record.plan or {}, record.audit or {}
    options = {f"--{name}": v for name, v in sorted(session["options"].items()) if name not in NAMES_ONLY}
    sources = [subset for dataset in audit.get("datasets", ()) for subset in dataset["subsets"]]
    data = {
        f"images of {source['source']}": f"{source['num_pictures']} x {source['num_repeats']}" for source in sources
    } | {"images left out": audit.get("num_dropped", 0)}
    versions = {f"version of {name}": value for name, value in session["versions"].items()}
    return {**options, **{name.replace("_", " "): plan.get(name) for name in OF_PLAN}, **data, **versions}


def is_measured_alike(records: Sequence[Record]) -> bool:
    """Return True if validation losses are comparable: held-out images selected by the same options, and equally
    many."""
    keys = []
    for record in records:
        options, plan = record.sessions[-1]["options"], record.plan or {}
        seed = options.get("validation_seed", plan.get("seed"))
        other_options = [options.get(name) for name in MEASURED_AS_SAID if name != "validation_seed"]
        keys.append((plan.get("pictures", {}).get("validation"), seed, other_options))
    return all(key == keys[0] for key in keys)


def build_comparison(paths: Sequence[Path]) -> str:
    """Build the page that compares runs. Raises UserError for fewer than two, or for one that cannot be read."""
    if len(paths) < 2:
        raise error_in("runs", cause="missing")("name two runs or more: folders, reports or files of --log_events")
    records = [read_run(path) for path in paths]
    labels = label_runs(records, paths)
    runs = [{"label": label, **select_shown(record)} for label, record in zip(labels, records, strict=True)]
    rows = differences(records)
    data = {"runs": runs, "differences": rows, "is_measured_alike": is_measured_alike(records)}
    return build_page(TITLES["comparison"] + " and ".join(labels), SCRIPT, data)


def select_shown(record: Record) -> Mapping[str, Any]:
    """Return the part of a record that the page needs."""
    values = record.as_json()
    names = ("step", "loss", "smoothed", "curves", "validations", "best", "prompts", "previews", "plan")
    return {**{name: values[name] for name in names}, "end": record.sessions[-1]["end"]}
