"""The state that all open pages show, and what changes it."""

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from library.base.version import VERSION
from library.page.history import History
from library.page.jobs import Trainings, list_gpu_programs, read_end
from library.page.store import Draft, Store, list_photos
from library.page.tasks import Tasks

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks at the queue
GPU_LOOKS = 15  # looks at the queue for one at the GPU
BEAT_S = 15.0  # a page that hears nothing this long is sent a sign
MOST_FOLLOWERS = 40
CODE = Path(__file__).resolve().parents[1]  # of the suite
BASES, LOGINS = "bases", "logins"
LONGER = 1.5  # times the steps of a run that goes on, until the user changes them


def read_code_version() -> str:
    """Return what changes if the suite's files are replaced."""
    newest = max(path.stat().st_mtime_ns for path in CODE.rglob("*.py"))
    return f"{VERSION} {newest}"


@dataclass
class Live:
    """The drafts, tasks and trainings of a server, and the pages that follow them."""

    store: Store
    trainings: Trainings
    tasks: Tasks = field(init=False)
    history: History = field(init=False)
    drafts: dict[str, Draft] = field(default_factory=dict)
    text: str = "{}"  # the state as JSON
    version: str = field(default_factory=read_code_version)
    _photos: dict[str, Any] = field(default_factory=dict)  # of drafts, as read last
    _revision: dict[str, int] = field(default_factory=dict)  # of drafts, so that other tabs load them again
    _runs: list[dict[str, Any]] = field(default_factory=list)
    _is_training: bool = False
    _is_updated: bool = False
    _gpu_programs: list[str] = field(default_factory=list)
    _followers: "set[asyncio.Event]" = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tasks = Tasks(self.store.folder, self.store.own / "tasks.log", self.publish)
        self.history = History(self.store.output)
        self.drafts = {draft.id: draft for draft in reversed(list(self.store.list_drafts()))}

    # --- following ---

    def publish(self) -> None:
        """Tell all pages the state if it has changed."""
        drafts = [
            {"id": id, "root": draft.root, "base": draft.base, "revision": self._revision.get(id, 0)}
            for id, draft in reversed(self.drafts.items())
        ]
        state = {
            "drafts": drafts,
            "tasks": {name: asdict(task) for name, task in self.tasks.states.items()},
            "runs": self._runs,
            "is_training": self._is_training,
            "gpu_programs": self._gpu_programs,
            "is_updated": self._is_updated,
        }
        text = json.dumps(state)
        if text != self.text:
            self.text = text
            for follower in self._followers:
                follower.set()

    def has_room(self) -> bool:
        return len(self._followers) < MOST_FOLLOWERS

    async def follow(self) -> AsyncIterator[str]:
        """Yield the state, and again after each change; "" now and then."""
        if not self.has_room():  # others may have come since the request was let in
            return
        changed = asyncio.Event()
        self._followers.add(changed)
        try:
            yield self.text
            while True:
                try:
                    await asyncio.wait_for(changed.wait(), BEAT_S)
                except asyncio.TimeoutError:
                    yield ""
                    continue
                changed.clear()
                yield self.text
        finally:
            self._followers.discard(changed)

    async def look(self) -> None:
        """Look at the queue and publish what has changed."""
        try:
            self._is_training = await asyncio.to_thread(self.trainings.tend)
            self._runs = await asyncio.to_thread(self.trainings.list_all)
        except OSError as error:  # a full disk, or a folder that another program holds: tried again
            logger.warning("%s", error)
        self.publish()

    async def watch(self) -> None:
        """Look at the queue again and again."""
        looks = 0
        while True:
            if looks % GPU_LOOKS == 0:
                self._gpu_programs = await asyncio.to_thread(list_gpu_programs, self.trainings.list_pids())
                with suppress(OSError):
                    self._is_updated = await asyncio.to_thread(read_code_version) != self.version
            await self.look()
            looks += 1
            await asyncio.sleep(LOOK_S)

    # --- drafts ---

    def save(self, draft: Draft) -> None:
        self.store.save(draft)
        self.drafts.pop(draft.id, None)
        self.drafts[draft.id] = draft
        self.touch(draft)

    def touch(self, draft: Draft) -> None:
        """Let all pages load a draft again."""
        self._revision[draft.id] = self._revision.get(draft.id, 0) + 1
        self.publish()

    def remove(self, draft: Draft) -> None:
        """Forget a draft. Uploaded photos stay, which a training may need to go on."""
        self.cancel(draft)
        self.drafts.pop(draft.id, None)
        shutil.rmtree(self.store.path_of(draft.id, "x").parent, ignore_errors=True)
        self.publish()

    def photos_of(self, draft: Draft) -> Any:
        """Return the photos as the worker found them; None before."""
        if self._photos.get(draft.id) is None:
            self._photos[draft.id] = self.store.read(draft.id, "photos.json")
        return self._photos[draft.id]

    # --- tasks ---

    def cancel(self, draft: Draft) -> None:
        for task in ("photos", "plan", "options", "captions", "download"):
            self.tasks.cancel(f"{draft.id}/{task}")
        self.publish()

    def read_photos(self, draft: Draft) -> None:
        def keep(result: Any) -> None:
            self.store.write(draft.id, "photos.json", result)
            self._photos[draft.id] = result
            self.touch(draft)

        self.tasks.begin(f"{draft.id}/photos", "photos", {"root": draft.root}, keep)

    def make_plan(self, draft: Draft) -> None:
        photos = (photo for photo in list_photos(self.photos_of(draft)) if draft.takes(photo))
        captions = {photo["name"]: draft.caption_of(photo) for photo in photos}

        def keep(result: Any) -> None:
            self.store.write(draft.id, "plan.json", {**result, "digest": draft.digest})
            self.touch(draft)

        inputs = {**asdict(draft), "photos": captions}
        del inputs["choices"]
        self.tasks.begin(f"{draft.id}/plan", "plan", inputs, keep)

    def list_options(self, draft: Draft) -> None:
        """List the options that a training on the draft's base has, and check those that it sets."""

        def keep(result: Any) -> None:
            self.store.write(draft.id, "options.json", result)
            self.touch(draft)

        self.tasks.begin(f"{draft.id}/options", "options", asdict(draft), keep)

    def start(self, draft: Draft, plan: Mapping[str, Any], trains: bool) -> None:
        def keep(result: Any) -> Mapping[str, Any]:
            if trains:
                self.store.save_origin(result["run"], draft)
                self.trainings.run()
            return dict(result)

        self.tasks.begin(f"{draft.id}/start", "start", {"plan": plan, "trains": trains}, keep)

    def repeat(self, run_id: str, is_longer: bool) -> Draft | None:
        """Prepare the training of a run once more, or one that goes on from its end; None for an unknown run.

        What was chosen since about its photos stays."""
        draft, job = self.store.find(run_id, "run.json"), self.trainings.find_job(run_id)
        if draft is None or job is None:
            return None
        draft = replace(draft, choices=self.drafts.get(draft.id, draft).choices, origin="")
        if is_longer:
            if (end := read_end(job)) is None:
                return None
            draft = replace(draft, origin=str(end.path), steps=int(LONGER * end.step), minutes=None)
        self.save(draft)
        if self.photos_of(draft) is None:
            self.read_photos(draft)
        return draft

    def write_captions(self, draft: Draft) -> None:
        """Describe the photos that have no caption."""

        def keep(result: Any) -> None:
            now = self.drafts.get(draft.id, draft)
            for name in names & result["captions"].keys():
                if not now.caption_of(photos[name]):  # the user may have written one meanwhile
                    now = now.change_photo(name, caption=result["captions"][name])
            self.save(now)

        photos = {photo["name"]: photo for photo in list_photos(self.photos_of(draft))}
        names = {name for name, photo in photos.items() if draft.takes(photo) and not draft.caption_of(photo)}
        self.tasks.begin(f"{draft.id}/captions", "captions", {"root": draft.root, "photos": sorted(names)}, keep)

    def download(self, draft: Draft, repository: str, file: str) -> None:
        """Download a base model from the hub for a draft."""

        def keep(result: Any) -> None:
            self.save(replace(self.drafts.get(draft.id, draft), base=result["base"]))

        self.tasks.begin(f"{draft.id}/download", "download", {"repository": repository, "file": file}, keep)

    def ask_logins(self) -> None:
        names = sorted({file["repository"] for file in (self.bases() or {}).get("published", ())})
        self.tasks.begin(LOGINS, "logins", {"repositories": names}, lambda result: dict(result))

    def draw_sheet(self, run_id: str, config: Path) -> None:
        inputs = {"folder": str(config.parent), "name": config.stem}
        self.tasks.begin(f"{run_id}/draw", "draw", inputs, lambda result: dict(result))

    # --- base models ---

    def bases(self) -> Any:
        return self.store.read(BASES, "bases.json")

    def search_bases(self, folders: list[str]) -> None:
        known = self.bases() or {"bases": [], "folders": []}
        more = list(dict.fromkeys([*known["folders"], *folders]))

        def keep(result: Any) -> None:
            self.store.write(BASES, "bases.json", {**result, "folders": more})

        self.tasks.begin(BASES, "bases", {"folders": more}, keep)
