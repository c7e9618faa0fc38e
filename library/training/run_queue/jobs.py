"""A job: what is trained, as it was when it was added."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from library.base.errors import of_file
from library.base.json_text import parse_json

VERSION = 1
MOST_BYTES = 10**7


@dataclass(frozen=True)
class Job:
    """A training with everything that its command needs; paths are absolute."""

    script: str  # name of the training script
    config: str  # the TOML file that was added
    text: str  # its content at that time
    options: tuple[str, ...]  # those after the TOML file
    folder: str  # the working folder
    output: str  # the adapter without its ending
    events: str | None  # file of --log_events; None: one in the queue's folder

    @property
    def name(self) -> str:
        return Path(self.output).name

    def as_text(self) -> str:
        return json.dumps({"queue": VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read a job's file. Raises UserError for another file, FileNotFoundError if it was moved."""
        if path.stat().st_size > MOST_BYTES:
            raise of_file(path)("is no job of this queue", "remove the file")
        try:
            values = parse_json(path.read_bytes())
            assert isinstance(values, dict) and values.pop("queue") == VERSION
            assert set(values) == {f.name for f in fields(cls)}
            options, texts = values.pop("options"), {**values, "events": values["events"] or ""}
            assert isinstance(options, list) and all(isinstance(text, str) for text in (*options, *texts.values()))
            assert Path(texts["script"]).name == texts["script"]  # of this suite, whoever wrote the job
        except (AssertionError, KeyError, ValueError):
            reason = "is no job of this version's queue; remove it, and add the job again"
            raise of_file(path)(reason) from None
        return cls(**values, options=tuple(options))
