"""The work of the page that needs torch: reading photos, recognising base models, planning and starting. Each runs in
a process of its own.

The process reads its inputs as JSON from standard input and writes JSON lines to standard output: progress, and last
the result or an error.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from library.base.atomic_files import write_whole
from library.base.errors import UserError, of_file
from library.memory.planner.gpus import Gpu, MemorySize, find_card, find_system, typical_gpu
from library.memory.planner.known import find_model, plan
from library.page.hub import download, find_logins, list_published
from library.page.model_folders import find_models
from library.page.settings import describe_error, list_settings, read_settings
from library.page.store import is_below, shorten_hash
from library.training.run_queue.folder import Queue

Say = Callable[..., None]
LR_NAMES = ("learning_rate", "unet_lr", "text_encoder_lr")
WAYS = {"--gradient_checkpointing": "recomputed", "--cpu_offload_checkpointing": "inputs", "int8": "int8", "nf4": "nf4",
        "--blocks_to_swap": "streamed"}  # fmt: skip
"""Words of a planned configuration -> the text that says what they do."""


# --- photos ---


def read_photos(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Find the photos below a folder as train.py does, with their captions and what the audit finds in them."""
    from library.data.description.image_extensions import image_extensions
    from library.data.plan.audit_findings import collect_findings, find_file_kinds
    from library.train_photos.photos import find_photos, suggest_trigger

    root, done = Path(inputs["root"]), count(1)
    total = sum(file.endswith(image_extensions()) for _, _, files in os.walk(root) for file in files)
    folders = find_photos(root, on_photo=lambda: say(done=min(next(done), total), total=total))
    measured = [one.measures for folder in folders for one in folder.photos if is_below(one.path, root)]
    names = {one.path for one in measured}
    problems: dict[str, list[str]] = {}
    for finding in (*collect_findings(measured, names), *find_file_kinds(measured, set())):
        for path, note in finding.images:
            problems.setdefault(path, []).append(strip_count(finding.text) + (f" ({note})" if note else ""))
    described = [describe_folder(folder, root, problems) for folder in folders]
    return {"folders": described, "trigger": suggest_trigger(root, folders).text}


def strip_count(text: str) -> str:
    """Return a finding about several images as one about each."""
    return text.split(" ", 2)[2]


def describe_folder(folder: Any, root: Path, problems: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return a folder of photos as values."""
    ending = folder.caption_extension
    outside = [one.path for one in folder.photos if not is_below(one.path, root)]
    photos = [
        {
            "name": one.path.relative_to(root).as_posix(),
            "caption": one.caption if is_below(one.path.with_suffix(ending), root) else "",
            "problems": problems.get(str(one.path), []),
        }
        for one in folder.photos
        if one.path not in outside
    ]
    left_out = [[path.name, reason] for path, reason in folder.left_out]
    left_out += [[path.name, "is a link that leads out of the folder"] for path in outside]
    return {"path": str(folder.path), "photos": photos, "left_out": left_out}


def choose_photos(inputs: Mapping[str, Any], scratch: Path) -> tuple[list[Any], Any, list[str]]:
    """Return the folders with the chosen photos, the trigger, and the content of each folder's metadata file, which is
    written into the folder `scratch`.

    Raises UserError if none is chosen.
    """
    from library.train_photos.photos import choose, find_photos, format_metadata, parse_trigger, suggest_trigger

    root, chosen = Path(inputs["root"]), inputs["photos"]
    all_folders = find_photos(root)
    trigger = parse_trigger(inputs["trigger"]) if inputs["trigger"] else suggest_trigger(root, all_folders)
    folders: list[Any] = []
    texts: list[str] = []
    for folder in all_folders:
        captions = {
            one.path: chosen[name]
            for one in folder.photos
            if (name := one.path.relative_to(root).as_posix()) in chosen and is_below(one.path, root)
        }
        if captions:
            file = scratch / f"photos-{len(texts)}.jsonl"
            folders.append(choose(folder, captions, str(file)))
            texts.append(format_metadata(captions, folder.describe_uncaptioned(trigger)))
            file.write_text(texts[-1], encoding="utf-8")
    num_found = sum(len(folder.photos) for folder in folders)
    if not folders:
        raise of_file(root)("has no photo that is chosen", "take at least one in")
    if num_found < len(chosen):
        reason = f"lacks {len(chosen) - num_found} of the chosen photos by now; read the folder again"
        raise of_file(root, cause="missing")(reason)
    return folders, trigger, texts


# --- planning and starting ---


def make_plan(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Plan a run as train.py does, and return the plan as values."""
    from library.train_photos.description import describe_plan, remark_on_trigger
    from library.train_photos.photos import clean
    from library.train_photos.plan import Files, RunOrder, choose_side
    from library.train_photos.plan import make_plan as build_plan
    from library.train_photos.runs import find_runs, list_names, make_record
    from library.train_photos.session import find_recipe

    args, base, given = read_settings(inputs)
    recipe = find_recipe(args, base)
    with TemporaryDirectory() as scratch:
        folders, trigger, texts = choose_photos(inputs, Path(scratch))
        rates = {name: recipe.values[name] * inputs["strength"] for name in LR_NAMES if name in recipe.values}
        given = {**(rates if inputs["strength"] != 1 else {}), **given}
        side = choose_side(base, recipe.values, given, folders)
        order = RunOrder(args, base, recipe, folders, trigger, side, given)
        plan = build_plan(order, Files(Path(scratch), "plan"))
        record = replace(make_record(order), origin=inputs["origin"])
    name = clean(trigger.word if inputs["is_upload"] else Path(inputs["root"]).name)
    _, files = find_runs(list_names(None, name))
    return {
        "name": name,
        "lines": [[line[:10].strip(), line[10:]] for line in describe_plan(plan, files)],
        "remarks": list(remark_on_trigger(trigger)),
        "steps": plan.values["max_train_steps"],
        "seconds": None if plan.duration is None else plan.duration.seconds,
        "texts": asdict(replace(plan.texts, prompts=inputs["prompts"] or plan.prompts)),
        "metadata": texts,
        "origin": inputs["origin"],
        "record": asdict(record),
    }


def start(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Write the files of a planned run under the first name that is free, and add it to the queue if that is asked."""
    from library.environment.requirements import quote
    from library.page.store import Store
    from library.train_photos.plan import RunTexts
    from library.train_photos.record import Record
    from library.train_photos.runs import is_free, list_names
    from library.train_photos.training import write

    plan = inputs["plan"]
    files = next(files for files in list_names(None, plan["name"]) if is_free(files) and not list_metadata(files))
    paths = [files.folder / metadata_name(files.name, number) for number in range(len(plan["metadata"]))]
    subsets = plan["texts"]["dataset"]["datasets"][0]["subsets"]
    for subset, path in zip(subsets, paths, strict=True):
        subset["metadata_file"] = str(path)
    for path, text in zip(paths, plan["metadata"], strict=True):
        write_whole(path, text)
    write(RunTexts(**plan["texts"]), files, Record(**plan["record"]))
    if plan["origin"]:
        copy_state(Path(plan["origin"]), files)
    script = plan["texts"]["script"]
    command = f"python3 {script} --config_file {quote(files.config)} --autoresume"
    run = add_job(Store(Path.cwd()).queue, files.config, script) if inputs["trains"] else None
    return {"name": files.name, "config": str(files.config), "command": command, "run": run}


def copy_state(origin: Path, files: Any) -> None:
    """Give a new run the last state of another one, from which --autoresume goes on. Raises UserError without it."""
    from library.training.saving.names import Names, state_folder
    from library.training.saving.state import read_manifest

    step = read_manifest(origin).step
    target = state_folder(Names(files.folder, files.name, "safetensors").of_step(step))
    unfinished = target.with_name(f".{target.name}.{uuid4().hex[:12]}")
    try:
        shutil.copytree(origin, unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def metadata_name(name: str, number: int) -> str:
    return f"{name}-photos.jsonl" if number == 0 else f"{name}-photos-{number + 1}.jsonl"


def list_metadata(files: Any) -> list[Path]:
    """Return the metadata files that a run of this name has already."""
    return list(files.folder.glob(f"{files.name}-photos*.jsonl"))


def add_job(queue: Queue, config: Path, script: str) -> str:
    """Add a run to the queue; return its ID on the page."""
    from library.architectures.scripts import list_scripts
    from library.training.run_queue.adding import make_job
    from tools.run_queue import list_script_names, read_script

    scripts = list_scripts()
    words = ["--report_live"]
    job = make_job(config, script, words, list_script_names(scripts), partial(read_script, scripts))
    queue.create()
    queue.add(job)
    return shorten_hash(job.output)


# --- base models and captions ---


def find_bases(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Recognise the base models in the folders of other programs; only headers and configs are read."""
    paths = find_models([Path(folder) for folder in inputs["folders"]])
    found, gpu = [], read_gpu()
    for number, path in enumerate(paths):
        say(done=number, total=len(paths))
        described = describe_base(path, gpu)
        if described is not None:
            found.append(described)
    return {"bases": found, "published": list_published()}


def read_gpu() -> Gpu | None:
    """Return the first GPU; None without one."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    size, card = MemorySize(properties.total_memory), find_card(properties.name)
    gpu = typical_gpu(size) if card is None else card.gpu(size.free_bytes)
    return replace(gpu, main_memory_bytes=psutil.virtual_memory().available)


def describe_fit(base: Any, gpu: Gpu | None) -> dict[str, Any] | None:
    """Return how a usual training of a base model fits a GPU, as counted; None if neither is known."""
    model = None if gpu is None else find_model(base.spec.name, base.num_values)
    if gpu is None or model is None:
        return None
    planned = plan(model, gpu, find_system())
    chosen = planned.chosen
    return {
        "gpu_bytes": gpu.memory_bytes,
        "bytes": planned.least_bytes if chosen is None else chosen.device_bytes,
        "ways": None if chosen is None else [way for option, way in WAYS.items() if option in chosen.options],
    }


def describe_base(path: Path, gpu: Gpu | None) -> dict[str, Any] | None:
    """Return a base model as values; None for a file that is none."""
    from library.train_photos.base import read_prediction, recognise

    try:
        base = recognise(str(path))
        is_measured = base.spec.objective is None and not base.spec.is_general  # flow models predict one thing
        predicted = read_prediction(base) if is_measured else None
    except UserError:
        return None
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        "path": str(path),
        "name": path.name,
        "family": base.title,
        "bytes": sum(file.stat().st_size for file in files),
        "is_distilled": base.is_distilled,
        "prediction": None if predicted is None else predicted.prediction,
        "fit": describe_fit(base, gpu),
    }


def write_captions(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Describe photos by the captioner; the captions are returned and written nowhere."""
    from library.train_photos.captioner import describe_photos

    root, captions = Path(inputs["root"]), {}
    paths = [path for name in inputs["photos"] if is_below(path := root / name, root)]
    say(done=0, total=len(paths))
    for photo, caption in describe_photos(paths):
        captions[photo.relative_to(root).as_posix()] = caption
        say(done=len(captions), total=len(paths))
    return {"captions": captions}


def draw_sheet(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Draw the sheets of a finished run, as train.py does at its end, and say which file to use."""
    from library.train_photos.base import recognise
    from library.train_photos.plan import Files
    from library.train_photos.record import Record
    from library.train_photos.sheets import draw_sheets, save_sheets
    from library.train_photos.training import choose_adapter

    files = Files(Path(inputs["folder"]), inputs["name"])
    record = Record.read(files.config)
    if record is None:
        raise of_file(files.config)("does not say what its base is", "draw with tools/draw.py")
    adapter, why = choose_adapter(files)
    lines = [line for file in list_metadata(files) for line in file.read_text(encoding="utf-8").splitlines()]
    photos = [path for line in lines if (path := Path(json.loads(line)["image_path"])).is_file()]
    save_sheets(draw_sheets(recognise(record.base), photos, files, adapter))
    return {"adapter": str(adapter), "why": why}


TASKS: Mapping[str, Callable[[Mapping[str, Any], Say], dict[str, Any]]] = {
    "photos": read_photos,
    "plan": make_plan,
    "options": list_settings,
    "start": start,
    "bases": find_bases,
    "download": download,
    "logins": find_logins,
    "captions": write_captions,
    "draw": draw_sheet,
}


def main() -> None:
    """Run the task that the command line names."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    inputs = json.loads(sys.stdin.readline())
    try:
        say(result=TASKS[sys.argv[2]](inputs, say))
    except UserError as error:
        say(error=describe_error(error))
    except Exception as error:  # a bug: the page shows its last line, and the log has the traceback
        traceback.print_exc()
        say(error={"message": f"{type(error).__name__}: {error}", "is_bug": True})
