"""The page's files below the output folder: drafts of trainings, thumbnails, and trainings that were stopped."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from library.base.atomic_files import write_whole
from library.base.errors import of_file
from library.base.json_text import parse_json
from library.training.run_queue.folder import Queue

MOST_CAPTION_LETTERS = 10_000
KINDS = ("character", "style")
STRENGTHS = (0.5, 1.0, 2.0)  # times the recipe's learning rate


def shorten_hash(text: str) -> str:
    """Return a short name for a text, such as a path."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Choice:
    """The user's changes to a photo."""

    is_out: bool = False
    caption: str | None = None  # None: that of the file beside the photo


@dataclass(frozen=True)
class Draft:
    """A training that is being prepared."""

    root: str  # folder of the photos
    is_upload: bool = False  # photos may be dropped into it
    trigger: str = ""  # "" for that of the folder's name
    base: str = ""
    models: str = ""
    kind: str = "character"
    steps: int | None = None
    minutes: float | None = None
    strength: float = 1.0
    prompts: str | None = None  # None for those of the recipe
    origin: str = ""  # the state of a finished run that this one goes on from
    # Further options of train.py by name: texts, a list of several, and True for those without a value.
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)  # by path below the root

    @property
    def id(self) -> str:
        return shorten_hash(self.root)

    @property
    def digest(self) -> str:
        """A digest of all that a plan depends on."""
        return shorten_hash(json.dumps(asdict(self), sort_keys=True))

    def caption_of(self, photo: Mapping[str, Any]) -> str:
        """Return the caption of a photo that was found: the user's, else that of the file beside it."""
        changed = self.choices.get(photo["name"], Choice()).caption
        return str(photo["caption"]) if changed is None else changed

    def takes(self, photo: Mapping[str, Any]) -> bool:
        return not self.choices.get(photo["name"], Choice()).is_out

    def change_photo(self, name: str, **values: Any) -> "Draft":
        return replace(self, choices={**self.choices, name: replace(self.choices.get(name, Choice()), **values)})


def read_draft(values: Mapping[str, Any]) -> Draft:
    choices = {name: Choice(**choice) for name, choice in values["choices"].items()}
    known = {f.name for f in fields(Draft) if f.name != "choices"}
    return Draft(**{name: value for name, value in values.items() if name in known}, choices=choices)


@dataclass(frozen=True)
class Store:
    """The folder that trainings are started in; all is kept in `output` below it."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def own(self) -> Path:
        return self.output / "page"

    @property
    def queue(self) -> Queue:
        return Queue(self.output / "queue")

    @property
    def uploads(self) -> Path:
        return self.own / "uploads"

    @property
    def thumbnails(self) -> Path:
        return self.own / "thumbnails"

    @property
    def stopped(self) -> Path:
        """The folder of jobs that were stopped and taken out of the queue."""
        return self.own / "stopped"

    def create(self) -> None:
        """Create the folders, for the owner alone. Raises UserError if they cannot be written."""
        try:
            self.own.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (self.uploads, self.thumbnails, self.stopped, self.own / "drafts"):
                path.mkdir(exist_ok=True)
        except OSError as error:
            raise of_file(self.own, cause="unreadable")(
                f"cannot be written: {error.strerror}", "use another --folder"
            ) from None
        self.queue.create()

    def path_of(self, draft_id: str, name: str) -> Path:
        return self.own / "drafts" / draft_id / name

    def write(self, draft_id: str, name: str, value: Any) -> None:
        path = self.path_of(draft_id, name)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(value))

    def read(self, draft_id: str, name: str) -> Any:
        """Return what was written; None if it is not there or damaged."""
        if not draft_id.isalnum():
            return None
        try:
            return parse_json(self.path_of(draft_id, name).read_bytes())
        except (OSError, ValueError):
            return None

    def save(self, draft: Draft) -> None:
        self.write(draft.id, "draft.json", asdict(draft))

    def save_origin(self, run_id: str, draft: Draft) -> None:
        """Keep the draft that a run was made from."""
        self.write(run_id, "run.json", asdict(draft))

    def has_origin(self, run_id: str) -> bool:
        return self.path_of(run_id, "run.json").exists()

    def find(self, draft_id: str, name: str = "draft.json") -> Draft | None:
        """Return a draft, or with the name "run.json" that of a run; None without one."""
        try:
            return read_draft(self.read(draft_id, name))
        except (KeyError, TypeError, AttributeError):
            return None

    def list_drafts(self) -> Iterator[Draft]:
        """Yield the drafts, the last changed first."""
        with suppress(FileNotFoundError):
            paths = sorted((self.own / "drafts").glob("*/draft.json"), key=os.path.getmtime, reverse=True)
            yield from (draft for path in paths if (draft := self.find(path.parent.name)) is not None)


# --- photos ---


def is_below(path: Path, root: Path) -> bool:
    """Return True for a file whose content lies in the folder `root`, wherever links on its path lead."""
    try:
        return path.resolve(strict=True).is_relative_to(root.resolve(strict=True))
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        return False


def list_photos(photos: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the photos of all folders that the worker found."""
    for folder in (photos or {}).get("folders", ()):
        yield from folder["photos"]


def find_photo(photos: Mapping[str, Any] | None, root: Path, name: str) -> Path | None:
    """Return the path of a photo that was found below `root`; None for any other name."""
    known = any(photo["name"] == name for photo in list_photos(photos))
    path = root / name
    return path if known and is_below(path, root) else None
