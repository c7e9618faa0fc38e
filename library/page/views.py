"""The views of the page: JSON for its scripts, thumbnails, reports and the page itself."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from jinja2 import Environment, FileSystemLoader
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from library.base.errors import UserError, of_file
from library.base.json_text import parse_json
from library.base.version import VERSION
from library.data.description.image_extensions import image_extensions
from library.page import hub
from library.page.jobs import REQUESTS, list_sheets
from library.page.live import Live
from library.page.model_folders import find_adapter_folders
from library.page.photos import list_folder, make_thumbnail
from library.page.security import Gate, TooLarge
from library.page.store import KINDS, MOST_CAPTION_LETTERS, STRENGTHS, Draft, find_photo, list_photos
from library.training.report_page.page import ENDING

HERE = Path(__file__).parent
STATIC = {path.name: path for path in (HERE / "static").iterdir()}
TYPES = {".js": "text/javascript", ".css": "text/css"}
CAPTIONS = (".txt", ".caption")
MOST_UPLOADED, MOST_NAME = 20_000, 200
SPARE_BYTES = 2 * 1024**3  # that uploads leave on the disk
MOST_STEPS = 10**7
MOST_OPTION_LETTERS, OPTION_NAME = 2000, re.compile(r"\w{1,60}")
TEXT_LIMITS = {"trigger": 200, "base": 2000, "models": 2000, "prompts": 20_000}


class Refused(Exception):
    """A request that the page's own scripts do not send, or that came too late. The name is one of texts.json."""

    def __init__(self, name: str, status: int = 400) -> None:
        self.name, self.status = name, status


def read_texts() -> dict[str, Any]:
    texts: dict[str, Any] = parse_json((HERE / "texts.json").read_bytes())
    return texts


@dataclass(frozen=True)
class Views:
    """The views of one server."""

    live: Live
    gate: Gate
    texts: Mapping[str, Any]

    def routes(self) -> list[Route]:
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self.show_page,
            "/static/{name}": self.send_static,
            "/api/events": self.send_events,
            "/api/drafts/{draft}": self.send_draft,
            "/api/drafts/{draft}/options": self.send_options,
            "/api/drafts/{draft}/thumbnails/{name:path}": self.send_thumbnail,
            "/api/folders": self.send_folder,
            "/api/bases": self.send_bases,
            "/api/history": self.send_history,
            "/history/report": self.send_past_reports,
            "/runs/{run}/report": self.send_report,
            "/runs/{run}/sheet": self.send_sheet,
            "/api/programs": self.send_programs,
            "/api/runs/{run}/log": self.send_log,
        }
        post: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/api/drafts": self.add_draft,
            "/api/drafts/{draft}": self.change_draft,
            "/api/drafts/{draft}/photos": self.change_photos,
            "/api/drafts/{draft}/replace": self.replace_in_captions,
            "/api/drafts/{draft}/tasks/{task}": self.begin_task,
            "/api/drafts/{draft}/remove": self.remove_draft,
            "/api/upload/{draft}/{name}": self.take_upload,
            "/api/bases": self.search_bases,
            "/api/logins": self.ask_logins,
            "/api/drafts/{draft}/download": self.download_base,
            "/api/runs/{run}/copy": self.copy_adapter,
            "/api/runs/{run}/draw": self.draw_sheet,
            "/api/runs/{run}/again": self.repeat_run,
            "/api/runs/{run}/{action}": self.act_on_run,
            "/api/queue/run": self.run_queue,
        }
        routes = [Route(path, self.answering(view), methods=["GET"]) for path, view in get.items()]
        return routes + [Route(path, self.answering(view), methods=["POST"]) for path, view in post.items()]

    def answering(self, view: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return a view that answers errors of the user as JSON."""

        async def answer(request: Request) -> Response:
            try:
                return await view(request)
            except Refused as refused:
                return JSONResponse({"message": self.texts["errors"][refused.name]}, refused.status)
            except UserError as error:
                return JSONResponse({"message": str(error), "setting": error.setting}, 400)
            # What was not read of a request must not be taken for the next one.
            except TooLarge:
                return JSONResponse({"message": self.texts["errors"]["size"]}, 413, {"connection": "close"})
            except asyncio.TimeoutError:
                return JSONResponse({"message": self.texts["errors"]["time"]}, 408, {"connection": "close"})
            except OSError as error:
                return JSONResponse({"message": str(error)}, 503)

        return answer

    # --- the page ---

    async def show_page(self, request: Request) -> Response:
        environment = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True)
        # In a script element nothing is markup but its end, and JSON may write < as an escape.
        texts = json.dumps(self.texts).replace("<", "\\u003c")
        page = environment.get_template("page.html").render(gate=self.gate, texts=texts, title=self.texts["title"])
        return Response(page, media_type="text/html", headers={"cache-control": "no-store"})

    async def send_static(self, request: Request) -> Response:
        path = STATIC.get(request.path_params["name"])
        if path is None:
            raise Refused("unknown", 404)
        return FileResponse(path, media_type=TYPES[path.suffix], headers={"cache-control": "no-cache"})

    async def send_events(self, request: Request) -> Response:
        """Send the state of everything, and again after each change."""
        if not self.live.has_room():
            raise Refused("busy", 503)

        async def stream() -> AsyncIterator[str]:
            async for text in self.live.follow():
                yield f"data: {text}\n\n" if text else ": still here\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    # --- drafts ---

    def draft_of(self, request: Request) -> Draft:
        draft = self.live.drafts.get(request.path_params["draft"])
        if draft is None:
            raise Refused("unknown", 404)
        return draft

    async def add_draft(self, request: Request) -> Response:
        """Begin a training on the photos of a folder, or on those that will be uploaded."""
        values = await read_json(request)
        if values.get("is_upload") is True:
            name = "".join(letter for letter in str(values.get("name") or "")[:50] if letter.isalnum()) or "subject"
            root = self.live.store.uploads / uuid4().hex[:8] / name
            root.mkdir(parents=True)
            draft = Draft(str(root), is_upload=True)
        else:
            root = absolute_folder(values.get("folder"))
            draft = Draft(str(root))
            draft = self.live.drafts.get(draft.id, draft)
        self.live.save(draft)
        if not draft.is_upload:
            self.live.read_photos(draft)
        return JSONResponse({"id": draft.id})

    async def send_draft(self, request: Request) -> Response:
        draft = self.draft_of(request)
        photos, plan = self.live.photos_of(draft), self.live.store.read(draft.id, "plan.json")
        shown = [
            {**photo, "caption": draft.caption_of(photo), "is_out": not draft.takes(photo)}
            for photo in list_photos(photos)
        ]
        left_out = [item for folder in (photos or {}).get("folders", ()) for item in folder["left_out"]]
        known = {**asdict(draft), "id": draft.id}
        del known["choices"]
        answer = {
            "draft": known,
            "photos": None if photos is None else shown,
            "left_out": left_out,
            "suggested_trigger": (photos or {}).get("trigger", ""),
            "plan": None if plan is None else shorten_plan(plan, draft),
        }
        return JSONResponse(answer, headers={"cache-control": "no-store"})

    # A draft is looked up when the request is read: another one may change it meanwhile.

    async def change_draft(self, request: Request) -> Response:
        values, draft = await read_json(request), self.draft_of(request)
        for name, value in values.items():
            if not is_setting(name, value):
                raise Refused("setting")
        if "options" in values:
            merged = {**draft.options, **values["options"]}
            values["options"] = {name: value for name, value in merged.items() if value is not None}
        if values.get("steps") is not None:
            values["minutes"] = None
        elif values.get("minutes") is not None:
            values["steps"] = None
        self.live.save(replace(draft, **values))
        return JSONResponse({})

    async def remove_draft(self, request: Request) -> Response:
        """Forget a draft; its photos stay."""
        self.live.remove(self.draft_of(request))
        return JSONResponse({})

    async def change_photos(self, request: Request) -> Response:
        """Take photos in or out, or set the caption of one."""
        values, draft = await read_json(request), self.draft_of(request)
        known = {photo["name"] for photo in list_photos(self.live.photos_of(draft))}
        names, changes = values.get("names"), {}
        if isinstance(values.get("is_out"), bool):
            changes["is_out"] = values["is_out"]
        if isinstance(values.get("caption"), str):
            changes["caption"] = one_line(values["caption"])
        if not isinstance(names, list) or not changes or not known.issuperset(map(str, names)):
            raise Refused("photo", 404)
        for name in names:
            draft = draft.change_photo(name, **changes)
        self.live.save(draft)
        return JSONResponse({})

    async def replace_in_captions(self, request: Request) -> Response:
        values, draft = await read_json(request), self.draft_of(request)
        find, new = str(values.get("find", "")), str(values.get("replace", ""))
        if not find:
            raise Refused("find")
        count = 0
        for photo in list_photos(self.live.photos_of(draft)):
            caption = draft.caption_of(photo)
            if find in caption:
                draft = draft.change_photo(photo["name"], caption=one_line(caption.replace(find, new)))
                count += 1
        self.live.save(draft)
        return JSONResponse({"count": count})

    async def begin_task(self, request: Request) -> Response:
        """Start a task of a draft: read its photos, plan it, write captions, or start the training."""
        draft, task = self.draft_of(request), request.path_params["task"]
        if task == "photos":
            self.live.read_photos(draft)
        elif task == "captions":
            self.live.write_captions(draft)
        elif task == "plan":
            if not draft.base:
                raise Refused("no_base")
            self.live.make_plan(draft)
        elif task == "options":
            self.live.list_options(draft)
        elif task in ("train", "write"):
            plan = self.live.store.read(draft.id, "plan.json")
            if plan is None or plan["digest"] != draft.digest:
                raise Refused("stale", 409)
            self.live.start(draft, plan, trains=task == "train")
        elif task == "cancel":
            self.live.cancel(draft)
        else:
            raise Refused("unknown", 404)
        return JSONResponse({})

    async def send_options(self, request: Request) -> Response:
        """Send the options that a training may have, with the values of its recipe and of its plan."""
        draft = self.draft_of(request)
        found, plan = (self.live.store.read(draft.id, f"{name}.json") for name in ("options", "plan"))
        planned = {} if plan is None else plan["texts"]["values"]
        return JSONResponse({"found": found, "planned": planned}, headers={"cache-control": "no-store"})

    async def send_thumbnail(self, request: Request) -> Response:
        draft = self.draft_of(request)
        photo = find_photo(self.live.photos_of(draft), Path(draft.root), request.path_params["name"])
        if photo is None:
            raise Refused("photo", 404)
        path = await asyncio.to_thread(make_thumbnail, photo, self.live.store.thumbnails)
        return FileResponse(path, media_type="image/jpeg", headers={"cache-control": "private, max-age=60"})

    async def take_upload(self, request: Request) -> Response:
        """Write a photo, or the caption of one, into the folder of an upload."""
        draft, name = self.draft_of(request), request.path_params["name"]
        root = Path(draft.root)
        if not draft.is_upload or not is_upload_name(name):
            raise Refused("upload_name")
        length = int(request.headers.get("content-length", 0))
        if shutil.disk_usage(root).free < length + SPARE_BYTES:
            raise Refused("disk", 507)
        if len(list(root.iterdir())) >= MOST_UPLOADED:
            raise Refused("many")
        unfinished = root / f".{uuid4().hex}"
        try:
            with unfinished.open("xb") as file:
                async for part in request.stream():
                    file.write(part)
            unfinished.replace(root / name)
        finally:
            unfinished.unlink(missing_ok=True)
        return JSONResponse({})

    # --- what is on the disk ---

    async def send_folder(self, request: Request) -> Response:
        text = request.query_params.get("path") or str(Path.home())
        return JSONResponse(await asyncio.to_thread(list_folder, absolute_folder(text)))

    async def send_bases(self, request: Request) -> Response:
        return JSONResponse(self.live.bases())

    async def search_bases(self, request: Request) -> Response:
        values = await read_json(request)
        more = [str(absolute_folder(values["folder"]))] if values.get("folder") else []
        self.live.search_bases(more)
        return JSONResponse({})

    async def ask_logins(self, request: Request) -> Response:
        self.live.ask_logins()
        return JSONResponse({})

    async def download_base(self, request: Request) -> Response:
        values, draft = await read_json(request), self.draft_of(request)
        name, file = str(values.get("repository")), str(values.get("file") or "")
        if not re.fullmatch(hub.NAME, name):
            raise Refused("hub_name")
        self.live.download(draft, name, file)
        return JSONResponse({})

    # --- trainings ---

    async def send_report(self, request: Request) -> Response:
        job = await asyncio.to_thread(self.live.trainings.find_job, request.path_params["run"])
        path = None if job is None else Path(job.output + ENDING)
        if path is None or not path.is_file():
            raise Refused("unknown", 404)
        return FileResponse(path, media_type="text/html", headers={"cache-control": "no-store"})

    async def send_history(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.live.history.list_all), headers={"cache-control": "no-store"})

    async def send_past_reports(self, request: Request) -> Response:
        """Send the report of a run of the history, or the comparison of several."""
        page = await asyncio.to_thread(self.live.history.build, request.query_params.getlist("run"))
        if page is None:
            raise Refused("unknown", 404)
        return Response(page, media_type="text/html", headers={"cache-control": "no-store"})

    async def send_sheet(self, request: Request) -> Response:
        job = await asyncio.to_thread(self.live.trainings.find_job, request.path_params["run"])
        sheets = [] if job is None else list_sheets(job)
        if not sheets:
            raise Refused("unknown", 404)
        return FileResponse(sheets[-1], media_type="image/png", headers={"cache-control": "no-cache"})

    async def send_programs(self, request: Request) -> Response:
        """Send the folders that other programs load adapters from."""
        return JSONResponse({"folders": list(map(str, await asyncio.to_thread(find_adapter_folders)))})

    async def copy_adapter(self, request: Request) -> Response:
        values = await read_json(request)
        name, folder = str(values.get("name")), str(values.get("folder"))
        if not await asyncio.to_thread(self.live.trainings.copy, request.path_params["run"], name, folder):
            raise Refused("unknown", 404)
        return JSONResponse({})

    async def draw_sheet(self, request: Request) -> Response:
        """Start or cancel the drawing of a finished adapter at several strengths."""
        run = request.path_params["run"]
        job = await asyncio.to_thread(self.live.trainings.find_job, run)
        if job is None:
            raise Refused("run", 409)
        if (await read_json(request)).get("cancel") is True:
            self.live.tasks.cancel(f"{run}/draw")
        else:
            self.live.draw_sheet(run, Path(job.config))
        return JSONResponse({})

    async def repeat_run(self, request: Request) -> Response:
        """Prepare a training like that of a run, or one that goes on from its end."""
        is_longer = (await read_json(request)).get("longer") is True
        draft = self.live.repeat(request.path_params["run"], is_longer)
        if draft is None:
            raise Refused("run", 409)
        return JSONResponse({"id": draft.id})

    async def send_log(self, request: Request) -> Response:
        return JSONResponse(
            {"lines": await asyncio.to_thread(self.live.trainings.read_log, request.path_params["run"])}
        )

    async def act_on_run(self, request: Request) -> Response:
        run, action = request.path_params["run"], request.path_params["action"]
        trainings = self.live.trainings
        acts = {"stop": trainings.stop, "continue": trainings.go_on, "remove": trainings.remove}
        acts |= {name: partial(trainings.request, name=name) for name in REQUESTS}
        if action not in acts:
            raise Refused("unknown", 404)
        if not await asyncio.to_thread(acts[action], run):
            raise Refused("run", 409)
        await self.live.look()
        return JSONResponse({})

    async def run_queue(self, request: Request) -> Response:
        await asyncio.to_thread(self.live.trainings.run)
        await self.live.look()
        return JSONResponse({})


# --- values of requests ---


async def read_json(request: Request) -> dict[str, Any]:
    """Return the object that a request holds. Raises Refused for anything else."""
    body = await request.body()
    with suppress(ValueError, RecursionError):
        values = parse_json(body or b"{}")
        if isinstance(values, dict):
            return values
    raise Refused("request")


def absolute_folder(text: object) -> Path:
    """Return the folder that the user typed. Raises UserError for none, and for a relative path."""
    if not isinstance(text, str) or "\0" in text or not text.strip():
        raise Refused("path")
    path = Path(text.strip().strip('"')).expanduser()
    if not path.is_absolute():
        raise Refused("path")
    if not path.is_dir():
        raise of_file(path, cause="missing")("is no folder", "choose the folder that holds the files")
    return path


def is_setting(name: str, value: object) -> bool:
    """Return True for a value that a field of a draft may have."""
    if name in TEXT_LIMITS:
        return (isinstance(value, str) and len(value) <= TEXT_LIMITS[name]) or (name == "prompts" and value is None)
    if name == "options":
        return isinstance(value, dict) and all(map(OPTION_NAME.fullmatch, value)) and all(map(is_given, value.values()))
    if name == "kind":
        return value in KINDS
    if name == "origin":  # a path, which the server alone sets
        return value == ""
    if name == "strength":
        return value in STRENGTHS
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MOST_STEPS
    if name == "steps":
        return value is None or (is_number and isinstance(value, int))
    return name == "minutes" and (value is None or is_number)


def is_given(value: object) -> bool:
    """Return True for what an option may be given: nothing, a text, several, or True for one without a value."""
    texts = value if isinstance(value, list) else [value]
    are_texts = all(
        isinstance(text, str) and 0 < len(text) <= MOST_OPTION_LETTERS and "\0" not in text for text in texts
    )
    return value is None or value is True or (bool(texts) and are_texts)


def is_upload_name(name: str) -> bool:
    """Return True for the name of a photo or a caption, without a folder."""
    is_plain = len(name) <= MOST_NAME and not name.startswith(".") and name.isprintable()
    return is_plain and not {*name} & {*'/\\:*?"<>|'} and name.endswith((*image_extensions(), *CAPTIONS))


def one_line(text: str) -> str:
    return " ".join(text.split())[:MOST_CAPTION_LETTERS]


def shorten_plan(plan: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Return what the page shows of a plan."""
    names = ("lines", "remarks", "steps", "seconds")
    shown = {name: plan[name] for name in names}
    return {**shown, "prompts": plan["texts"]["prompts"], "is_stale": plan["digest"] != draft.digest}


def make_views(live: Live, gate: Gate) -> Views:
    return Views(live, gate, {**read_texts(), "version": VERSION})
