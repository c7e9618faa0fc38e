"""A job: what is trained, as it was when it was added."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from library.base.errors import of_file
from library.base.json_text import parse_json
from library.training.saving.state_names import MANIFEST_FILE, is_state_name

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
    since: float | None = None  # when a job that begins with --resume was added; None for others

    @property
    def name(self) -> str:
        return Path(self.output).name

    def list_states(self) -> list[Path]:
        """Return the whole states of this training, and of earlier ones of its name, the latest last."""
        folder, names = Path(self.output).parent, (self.name,)
        manifests = [path for path in folder.glob(f"*/{MANIFEST_FILE}") if is_state_name(path.parent.name, names)]
        return [path.parent for path in sorted(manifests, key=lambda path: path.stat().st_mtime)]

    def find_own_state(self) -> str | None:
        """Return the value of --resume with which a job that was stopped goes on from its own state instead of the one
        that it began with; None if it has none yet, "" if --autoresume finds it."""
        states = self.list_states() if self.since is not None else []
        own = [path for path in states if (path / MANIFEST_FILE).stat().st_mtime > (self.since or 0)]
        # An earlier run of this name may have come farther.
        return (str(own[-1]) if len(own) < len(states) else "") if own else None

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
            since = values.setdefault("since", None)  # which earlier versions did not write
            assert set(values) == {f.name for f in fields(cls)} and isinstance(since, float | None)
            options, texts = values.pop("options"), {**values, "events": values["events"] or "", "since": ""}
            assert isinstance(options, list) and all(isinstance(text, str) for text in (*options, *texts.values()))
            assert Path(texts["script"]).name == texts["script"]  # of this suite, whoever wrote the job
        except (AssertionError, KeyError, ValueError):
            reason = "is no job of this version's queue; remove it, and add the job again"
            raise of_file(path)(reason) from None
        return cls(**values, options=tuple(options))
