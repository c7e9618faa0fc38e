"""How the runs of a sweep ended, read from their events or reports without importing torch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.base.json_text import parse_json
from library.options.output.saving import SavingOptions
from library.training.report_page.page import ENDING, read_data

STOPPED = "stopped"  # reason of the end
EARLY = {"non-finite": "its losses were not finite", "early stopping": "early stopping (--early_stop_patience)"}


@dataclass(frozen=True)
class Outcome:
    """The end of a run and its last validation."""

    reason: str | None = None  # of the last `end` event; None if there is none
    step: int = 0
    cause: str | None = None
    measured_step: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)  # of each held-out image, by the digest of its content

    @property
    def ended(self) -> str:
        """Why the run ended before its last step; "" if it did not."""
        return EARLY.get(self.cause or "", "")


def end_file(saving: SavingOptions) -> Path:
    """Return the path of a run's adapter."""
    return Path(saving.output_dir or "") / f"{saving.output_name}.{saving.save_model_as or 'safetensors'}"


def report_file(saving: SavingOptions) -> Path:
    return Path(saving.output_dir or "") / f"{saving.output_name}{ENDING}"


def read_outcome(saving: SavingOptions, log_events: str | None, since: float = 0.0) -> Outcome:
    """Read the events that a run has logged, else its report.

    The end of a process that started before `since` (Unix time) does not count, because a run that fails early leaves
    what an earlier one has written."""
    if log_events:
        return read_events(Path(log_events), since)
    try:
        data = read_data(report_file(saving).read_text(encoding="utf-8"))
        session, measured = (data["sessions"] or [{}])[-1], data.get("last_losses") or {}
        is_new = session.get("time", 0.0) >= since
        end = (session.get("end") or {}) if is_new else {}
        step = (end.get("step") or data.get("step") or 0) if is_new else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Outcome()
    return build(end, step, measured.get("step"), measured.get("losses") or {})


def read_events(path: Path, since: float) -> Outcome:
    """Read the outcome from an events file, which several processes of the run may have written."""
    end: Mapping[str, Any] = {}
    step, measured_step, losses, is_new = 0, None, dict[str, float](), True
    with suppress(OSError), path.open(encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line of another program, or damaged
                event = parse_json(line)
                if event.get("event") == "start":
                    end, is_new = {}, event.get("time", 0.0) >= since
                elif event.get("event") == "validation":
                    measured_step, losses = event["step"], event.get("losses") or {}
                elif event.get("event") == "end" and is_new:
                    end, step = event, event.get("step") or step
    return build(end, step, measured_step, losses)


def build(end: Mapping[str, Any], step: int, measured_step: int | None, losses: Mapping[str, float]) -> Outcome:
    return Outcome(end.get("reason"), step, end.get("cause"), measured_step, losses)
