"""The run itself, through the base model's own script, and what to do with its files."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

from library.base.atomic_files import remove_temporary
from library.base.errors import UserError, error_in
from library.checkpoints.base_model_spec import Program
from library.environment.requirements import quote
from library.train_photos.description import describe_plan
from library.train_photos.plan import OUTPUT, Files, Plan, RunTexts
from library.train_photos.record import Record
from library.train_photos.runs import Start, holding, is_free
from library.train_photos.screen import Screen, logging_to
from library.train_photos.sheets import Sheets, draw_sheets, read_photos, save_sheets
from library.training.command_line.main import main
from library.training.report_page.index import IndexedRuns, write_index
from library.training.report_page.writer import add_notes, read_report
from library.training.reporting.console_lines import announce, duration
from library.training.reporting.sample_images import encode_data_url
from library.training.saving.saved_files import read_num_steps
from tools.contact_sheet import LARGEST_IN_REPORT

LONGER = 1.5  # times the steps, in the command that continues
MOST_PHOTOS = 24  # in the report
FOLDERS: dict[Program, str] = {"ComfyUI": "loras", "Forge": "Lora"}  # in the program's folder of models


def train(plan: Plan, start: Start, record: Record) -> int:
    """Write the files of a new run, train, draw and say what to do with the adapter. Return the exit status.

    A start that fails leaves no NAME.toml.
    """
    files, began = start.files, monotonic()
    advice: list[str] = []
    with logging_to(files.log) as stream, Screen(stream, plan.duration) as screen:
        if start.earlier is None:
            write(plan.texts, files, record)
        status = run_script(plan, start, screen)
        if status == 0 and is_trained(files):
            screen.show_stage("drawing")
            adapter, why = choose_adapter(files)
            sheets = draw_sheets(plan.order.base, [photo.path for photo in plan.order.photos], files, adapter)
            advice = [*advise(plan, files, adapter, why, sheets), describe_time(plan, monotonic() - began)]
            add_to_report(plan, files, sheets, advice)
            save_sheets(sheets)
    if status == 0 and not advice:  # stopped, and saved under the name of its step
        advice = ["To continue, give the same command again"]
    for line in [*advice, f"All else is in {files.log}"] if status == 0 else []:
        announce(line)
    return status


def run_script(plan: Plan, start: Start, screen: Screen) -> int:
    """Train by the base model's own script. Return its exit status."""
    files, spec, status = start.files, plan.order.base.spec, 1
    functions = {"latents": spec.latents, "objective": spec.objective}
    try:
        parser = plan.order.base.make_parser()
        status = main(parser, spec.options, spec.build, list_arguments(start), **functions, sinks=[screen])
    finally:
        if status == 1 and start.earlier is None and files.find_state() is None:
            remove(files)
    return status


def is_trained(files: Files) -> bool:
    """Return True if a run has reached its end."""
    state = files.find_state()
    return state is not None and "end" in state.done


def write(texts: RunTexts, files: Files, record: Record) -> None:
    """Write the files of a new run. Raises UserError if another process trains one of this name."""
    with holding(files):
        if not is_free(files):
            raise error_in("--name", path=files.config, cause="would be lost")(
                f"another run has taken the name {files.name} meanwhile", "give the same command again"
            )
        remove_temporary(files.folder, lambda stem: stem in [path.stem for path in files.texts])
        texts.write(files, record.line)


def remove(files: Files) -> None:
    """Remove the texts of a run, unless another process trains with them."""
    with suppress(UserError), holding(files):
        for path in files.texts:
            path.unlink(missing_ok=True)


def list_arguments(start: Start) -> list[str]:
    """Return the arguments of the base model's script."""
    arguments = ["--config_file", str(start.files.config)]
    arguments += [] if start.steps is None else ["--max_train_steps", str(start.steps)]
    origin = start.origin if start.earlier is None else start.earlier.record.origin
    return [*arguments, *(["--resume", origin] if origin and start.files.find_state() is None else ["--autoresume"])]


def write_command(plan: Plan, start: Start) -> str:
    """Return the command that trains as the plan says."""
    return f"python3 {plan.order.base.spec.script} {' '.join(map(quote, list_arguments(start)))}"


def choose_adapter(files: Files) -> tuple[Path, str]:
    """Return the file to use and why: the one that the run suggests by its validation, else the last."""
    report = files.names.of_report()
    choice = read_report(report).choice if report.is_file() else None
    if choice is not None and choice["suggested"]:
        return Path(choice["suggested"]), choice["reason"]
    return files.adapter, "the last one, because too few photos can be set aside to measure files on"


def advise(plan: Plan, files: Files, adapter: Path, why: str, sheets: Sheets) -> Iterator[str]:
    """Yield what to do with the adapter."""
    base, trigger = plan.order.base, plan.order.trigger
    yield f"Use {adapter}: {why}"
    yield f"  an earlier one if it draws better: {sheets.files}; {sheets.seen}"
    yield (
        "  at strength 1, as it was trained; less if the other words of a prompt get lost: "
        f"{sheets.strengths} shows the prompts at several strengths"
    )
    yield f"  with {trigger.word!r} in the prompt, such as {trigger.text!r}"
    for program, name in FOLDERS.items():
        if program in base.spec.readers:
            yield f"  {program}: copy it to {find_folder(base.path, name) or f'models/{name} of {program}'}"
    longer = int(LONGER * read_num_steps(files.adapter))
    yield f"To train longer, give the same command with --steps {longer}: it goes on under a new name"


def describe_time(plan: Plan, seconds: float) -> str:
    planned = "" if plan.duration is None else f", {duration(plan.duration.seconds)} were planned"
    return f"It took {duration(seconds)}{planned}"


def add_to_report(plan: Plan, files: Files, sheets: Sheets, advice: list[str]) -> None:
    """Put the plan, some photos, the sheets and the advice into the report, and list all runs of the default folder."""
    photos = [photo.path for photo in plan.order.photos[:MOST_PHOTOS]]
    thumbnails = [encode_data_url(image) for image in read_photos(photos)]
    images = {title: encode_data_url(image, *LARGEST_IN_REPORT) for title, image in sheets.images.items()}
    notes = {"Use it": advice, "Plan": describe_plan(plan, files)}
    with suppress(UserError):  # no report, if the user's options turn it off
        add_notes(files.names.of_report(), notes, thumbnails, images)
    if files.folder.parent == OUTPUT.absolute():
        try:
            write_index(IndexedRuns(files.folder.parent))
        except UserError as error:  # an index of another program
            announce(f"note      {error}")


def find_folder(base: Path, name: str) -> Path | None:
    """Return the folder of adapters beside the one that the base is in, if it is that of a program."""
    return next((folder / name for folder in base.parents if (folder / name).is_dir()), None)
