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

    def find_own_state(self) -> Path | None:
        """Return the latest undamaged state that a job that begins with --resume saved itself, from which it goes on;
        None if it has none yet. Other jobs have --autoresume."""
        if self.since is None:
            return None
        from library.training.saving.state import are_undamaged, iterate_states  # imports torch

        states = iterate_states(Path(self.output).parent, (self.name,))
        own = [state for state in states if state.written_at > self.since]
        own.sort(key=lambda state: state.written_at, reverse=True)
        return next((state.path for state in own if are_undamaged([state])), None)

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
