"""The record by which train.py knows a run again, a line of its NAME.toml; read without torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from library.base.json_text import parse_json

RECORD = "# run: "  # begins the line of NAME.toml with the record


@dataclass(frozen=True)
class Record:
    """Photos, base, options and length of a run: two runs with the same values are the same run."""

    photos: str  # a count and a digest
    captions: str  # a digest of what they are trained as
    trigger: str
    base: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)  # that were typed, without the length
    length: Mapping[str, Any] = field(default_factory=dict)  # as typed; empty for that of the recipe
    origin: str = ""  # the state of another run that it begins with

    @classmethod
    def read(cls, config: Path) -> "Record | None":
        """Read the record of a NAME.toml; None for a file without one."""
        try:
            lines = config.read_text(encoding="utf-8").splitlines()
            values = parse_json(next(line for line in lines if line.startswith(RECORD)).removeprefix(RECORD))
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except (OSError, ValueError, StopIteration, KeyError, TypeError):
            return None

    @property
    def line(self) -> str:
        return f"{RECORD}{json.dumps(asdict(self))}\n"

    def is_about_the_same(self, other: "Record") -> bool:
        """Return True if both train the same thing, perhaps on other photos or with other options."""
        return (self.trigger, self.base, self.kind) == (other.trigger, other.base, other.kind)

    def differences(self, now: "Record") -> list[str]:
        """Name what differs in `now`, besides the length."""
        found = [] if self.photos == now.photos else [f"{self.photos} then and {now.photos} now"]
        if self.captions != now.captions and self.photos == now.photos:
            found.append("other captions")
        for name in sorted({*self.options, *now.options}):
            before, after = self.options.get(name, "not given"), now.options.get(name, "not given")
            if before != after:
                found.append(f"--{name} {before} then and {after} now")
        return found
