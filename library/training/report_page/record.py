"""The record of a run for its report, built from its events one by one.

It has bounded size, consists of plain values, and depends on the events alone: the report stores it, a resumed run
reads it back, and `tools/report.py` rebuilds it from an events file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import sqrt
from pathlib import PurePath, PureWindowsPath
from statistics import fmean, stdev
from typing import Any, TypedDict, get_type_hints

from library.training.report_page.thinning import Curves, Kept, SavedCurves, SavedKept
from library.training.reporting.event_checks import check_value
from library.training.reporting.events import Audit, TrainingPlan

VERSION = 1
MOST_FINDINGS = 20
MOST_VALIDATIONS = 300
MOST_TIMES = 40  # previews per prompt
KEPT = {
    "validations": MOST_VALIDATIONS,
    "previews": MOST_TIMES,
    "strengths": MOST_TIMES,
    "forgetting": MOST_VALIDATIONS,
    "scores": MOST_VALIDATIONS,
}
LATER = ("strengths", "forgetting", "scores")  # fields missing in older reports
MOST_PROMPTS = 16
MOST_SCORES = 8
MOST_GROUPS = 12  # of the optimizer
MOST_WARNINGS = 100
MOST_SESSIONS = 20
MOST_FILES = 500
SMOOTHED_OVER = 20  # the smoothed loss averages over this fraction of the run ...
FEWEST_SMOOTHED, MOST_SMOOTHED = 10, 1000  # ... within these numbers of steps
THUMBNAIL = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/]+=*")

Line = Mapping[str, Any]


@dataclass
class Smoothed:
    """An exponential average starting with the first value: a weighted sum and its weight."""

    over: int = FEWEST_SMOOTHED  # steps after which a value has the weight 1/e
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        """Add a value and return the average."""
        keep = 1 - 1 / self.over
        self.total, self.weight = self.total * keep + value, self.weight * keep + 1
        return self.total / self.weight


class Session(TypedDict):
    """A process of the run."""

    time: float  # its start
    command: Sequence[str] | None
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    end: Mapping[str, Any] | None
    first_step: int | None


@dataclass
class Record:
    """Everything that the report shows. Each start or resume of the run adds one of the `sessions`."""

    updated: float = 0.0
    sessions: list[Session] = field(default_factory=list)
    plan: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)  # of this session: seconds, count
    began: dict[str, float] = field(default_factory=dict)  # start times of the running stages
    step: int = 0
    epoch: int = 0
    loss: float | None = None  # smoothed
    smoothed: Smoothed = field(default_factory=Smoothed)
    curves: Curves = field(default_factory=Curves)
    validations: Kept = field(default_factory=lambda: Kept(MOST_VALIDATIONS))
    last_losses: dict[str, Any] | None = None  # step, and each image's loss by the digest of its content
    forgetting: Kept = field(default_factory=lambda: Kept(MOST_VALIDATIONS))
    best: dict[str, Any] | None = None  # step, loss
    choice: dict[str, Any] | None = None  # among the saved files
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by number
    previews: Kept = field(default_factory=lambda: Kept(MOST_TIMES))
    strengths: Kept = field(default_factory=lambda: Kept(MOST_TIMES))  # comparisons of images at several strengths
    scores: Kept = field(default_factory=lambda: Kept(MOST_VALIDATIONS))  # of previews: mean and error by name
    files: list[dict[str, Any]] = field(default_factory=list)
    num_removed: int = 0
    warnings: list[dict[str, Any]] = field(default_factory=list)
    num_warnings_left_out: int = 0
    # Content without events, all of it as data: URLs or texts:
    sheet: str | None = None  # a contact sheet
    notes: dict[str, list[str]] = field(default_factory=dict)  # lines of train.py: its plan, its advice
    photos: list[str] = field(default_factory=list)
    sheets: dict[str, str] = field(default_factory=dict)  # by title

    @property
    def is_empty(self) -> bool:
        return self.updated == 0

    def add(self, line: Line) -> None:
        """Add an event; unknown events, for example of later versions, are ignored."""
        self.updated = line["time"]
        handler = {
            "start": self._start, "audit": self._audit, "finding": self._finding, "stage": self._stage,
            "plan": self._plan, "step": self._step, "validation": self._validation, "choice": self._choice,
            "forgetting": self._forgetting,
            "preview": self._preview, "strengths": self._strengths, "scores": self._scores,
            "saved": self._saved, "removed": self._removed, "warning": self._warning, "end": self._end,
        }.get(line["event"])  # fmt: skip
        if handler is not None:
            handler(line)

    # One method per event:

    def _start(self, line: Line) -> None:
        options = line["options"]
        self.sessions.append(
            {
                "time": line["time"],
                "command": line["command"],
                "options": options,
                "versions": line["versions"],
                "end": None,
                "first_step": None,
            }
        )
        del self.sessions[:-MOST_SESSIONS]
        # The new process reads the data and loads the models again.
        self.audit, self.findings, self.stages, self.began = None, [], {}, {}

    def _audit(self, line: Line) -> None:
        self.audit = get_values(line) | {"pairs": filter_images(line.get("pairs", []))}

    def _finding(self, line: Line) -> None:
        if len(self.findings) >= MOST_FINDINGS:
            return
        images = filter_images(line["pictures"])
        self.findings.append({"text": line["text"], "pictures": images, "num_pictures": line["num_pictures"]})

    def _stage(self, line: Line) -> None:
        name = line["name"]
        if line["state"] == "begin":
            self.began[name] = line["time"]
        elif line["state"] == "end" and name in self.began:
            seconds, count = self.stages.get(name, [0.0, 0])
            self.stages[name] = [round(seconds + line["time"] - self.began.pop(name), 3), count + 1]

    def _plan(self, line: Line) -> None:
        first_step = line["first_step"]
        if first_step == 0:
            self._forget_earlier_sessions()
        # Steps after the resumed state were lost with their process, and are trained again.
        self.curves.cut(first_step)
        for name in KEPT:
            getattr(self, name).keep_up_to(first_step)
        self.step, self.choice = first_step, None
        self.plan = get_values(line)
        steps = line["max_train_steps"] // SMOOTHED_OVER
        self.smoothed.over = min(max(steps, FEWEST_SMOOTHED), MOST_SMOOTHED)
        if self.sessions:
            self.sessions[-1]["first_step"] = first_step

    def _forget_earlier_sessions(self) -> None:
        """Drop earlier runs in the same events file when a run begins."""
        kept_fields = {"updated", "audit", "findings", "stages", "began", "num_warnings_left_out"}
        session_start = self.sessions[-1]["time"] if self.sessions else 0.0
        fresh = Record(
            sessions=self.sessions[-1:],
            warnings=[warning for warning in self.warnings if warning["session"] == session_start],
        )
        for f in fields(self):
            if f.name not in kept_fields:
                setattr(self, f.name, getattr(fresh, f.name))

    def _step(self, line: Line) -> None:
        self.step, self.epoch = line["step"], line["epoch"]
        values: dict[str, float | None] = {"loss": line["loss"], "gradient": line["gradient_norm"]}
        if line["loss"] is not None:
            self.loss = values["smoothed"] = self.smoothed.add(line["loss"])
        groups = list(line["learning_rates"])[:MOST_GROUPS]
        values |= {f"lr {name}": line["learning_rates"][name] for name in groups}
        for name in groups if line["norms"] else ():
            if name in line["norms"]:
                values[f"gradient {name}"] = line["norms"][name]["gradient"]
                values[f"weight {name}"] = line["norms"][name]["weight"]
        values |= {name: value for name, value in (line["memory"] or {}).items()}
        if timing := line["timing"]:
            values |= {name: timing[name] for name in ("seconds", "pictures_per_second", "tflops", "mfu")}
            values |= {f"part {name}": seconds for name, seconds in timing["parts"].items()}
        self.curves.add(line["step"], values)

    def _validation(self, line: Line) -> None:
        item = {name: line[name] for name in ("step", "loss", "error", "levels", "compared")}
        self.validations.add({**item, "preference": line.get("preference")})
        if line.get("losses"):
            self.last_losses = {"step": line["step"], "losses": line["losses"]}
        if line["best_loss"] is not None:
            self.best = {"step": line["best_step"], "loss": line["best_loss"]}

    def _forgetting(self, line: Line) -> None:
        self.forgetting.add({name: line[name] for name in ("step", "loss", "error", "compared")})

    def _choice(self, line: Line) -> None:
        self.choice = get_values(line)

    def _preview(self, line: Line) -> None:
        number = str(line["index"])
        if line["index"] >= MOST_PROMPTS or not THUMBNAIL.fullmatch(line["thumbnail"]):
            return
        self.prompts[number] = {name: line[name] for name in ("prompt", "seed", "width", "height")}
        self.prompts[number]["strength"] = line.get("strength", 1.0)
        item = self.previews.at_step({"step": line["step"], "epoch": line["epoch"], "pictures": {}})
        item["pictures"][number] = line["thumbnail"]

    def _strengths(self, line: Line) -> None:
        item = self.strengths.at_step({"step": line["step"], "prompts": []})
        item["prompts"].append({name: line[name] for name in ("prompt", "seed", "strengths", "correlation")})

    def _scores(self, line: Line) -> None:
        item = self.scores.at_step({"step": line["step"], "scores": {}})
        first = list(line["scores"].items())[:MOST_SCORES]
        item["scores"] = {name: summarize(values) for name, values in first}

    def _saved(self, line: Line) -> None:
        self._drop_file(line["file"])
        names = ("file", "kind", "reason", "step", "epoch", "num_bytes")
        path = line["file"]  # of any system
        last_part = (PureWindowsPath if "\\" in path else PurePath)(path).name
        self.files.append({name: line[name] for name in names} | {"name": last_part})
        del self.files[:-MOST_FILES]

    def _removed(self, line: Line) -> None:
        self._drop_file(line["file"])
        self.num_removed += 1

    def _drop_file(self, path: str) -> None:
        self.files = [file for file in self.files if file["file"] != path]

    def _warning(self, line: Line) -> None:
        session = self.sessions[-1]["time"] if self.sessions else 0.0
        for warning in self.warnings:
            if (warning["text"], warning["session"]) == (line["text"], session):
                warning["count"] += 1
                return
        if len(self.warnings) >= MOST_WARNINGS:
            self.num_warnings_left_out += 1
            return
        self.warnings.append({"level": line["level"], "text": line["text"], "count": 1, "session": session})

    def _end(self, line: Line) -> None:
        if self.sessions:
            names = ("reason", "step", "seconds", "error", "summary", "file")
            self.sessions[-1]["end"] = {name: line[name] for name in names} | {"cause": line.get("cause")}

    # As plain values:

    @property
    def name(self) -> str:
        options = self.sessions[-1]["options"] if self.sessions else {}
        return str(options.get("output_name") or "last")

    def as_json(self) -> dict[str, Any]:
        """Return plain values from which `from_json` restores the record."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {"curves": self.curves.as_json(), "smoothed": vars(self.smoothed)}
        lists = {name: getattr(self, name).as_json() for name in KEPT}
        return {"version": VERSION, "name": self.name, **values, **parts, **lists}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Restore a record from `as_json`. Raises ValueError for other values."""
        if values.get("version") != VERSION:
            raise ValueError(f"its data have version {str(values.get('version'))[:20]}, not {VERSION}")
        restored: dict[str, Any] = {f.name: values.get(f.name) for f in fields(cls)}
        for name in LATER:  # missing in older reports
            restored[name] = restored[name] or Kept(KEPT[name]).as_json()
        empty_notes: Mapping[str, Any] = {"notes": {}, "photos": [], "sheets": {}}
        restored |= {name: restored[name] or empty for name, empty in empty_notes.items()}
        for name, annotation in {**get_type_hints(cls), **SAVED_AS}.items():
            check_value(restored[name], annotation, name)
        restored["curves"] = Curves.from_json(restored["curves"])
        smoothed = restored["smoothed"]
        restored["smoothed"] = Smoothed(**{f.name: smoothed[f.name] for f in fields(Smoothed) if f.name in smoothed})
        restored |= {name: Kept.from_json(limit, restored[name]) for name, limit in KEPT.items()}
        return cls(**restored)


SAVED_AS = {  # fields of Record that have other types as plain values
    "plan": TrainingPlan | None,
    "audit": Audit | None,
    "curves": SavedCurves,
    **dict.fromkeys(KEPT, SavedKept),
}


def filter_images(images: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Drop images whose thumbnails are not valid, since lines may come from anywhere."""
    return [
        image if image["thumbnail"] and THUMBNAIL.fullmatch(image["thumbnail"]) else {**image, "thumbnail": None}
        for image in images
    ]


def summarize(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the mean of the finite values and its standard error, None where there are too few."""
    known = [value for value in values if value is not None]
    error = stdev(known) / sqrt(len(known)) if len(known) > 1 else None
    return {"mean": fmean(known) if known else None, "error": error}


def get_values(line: Line) -> dict[str, Any]:
    """Return the fields of an event's line, without those common to all lines."""
    return {name: value for name, value in line.items() if name not in ("v", "event", "time")}
