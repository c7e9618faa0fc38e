"""The run itself, through the base model's own script, and what to do with its files."""

from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from itertools import count
from pathlib import Path

from library.base.errors import UserError
from library.checkpoints.base_model_spec import Program
from library.checkpoints.files import remove_temporary
from library.environment.requirements import quote
from library.train_photos.plan import Files, Plan, RunTexts
from library.train_photos.runs import Record, Start, holding, is_free
from library.training.command_line.main import main
from library.training.report_page.writer import read_report
from library.training.reporting.console_lines import announce
from library.training.saving.names import Names
from library.training.saving.saved_files import read_num_steps
from library.training.saving.state import StateManifest, newest_state
from tools import draw

STRENGTHS = ("0", "0.5", "0.75", "1")
LONGER = 1.5  # times the steps, in the command that continues
FOLDERS: dict[Program, str] = {"ComfyUI": "loras", "Forge": "Lora"}  # in the program's folder of models


def train(plan: Plan, start: Start, record: Record, steps: int | None) -> int:
    """Write the files of a new run, train, draw and say what to do with the adapter. Return the exit status.

    `steps` is the length of a run that goes on, if it is not that of its NAME.toml. A start that fails leaves no
    NAME.toml.
    """
    files, spec = start.files, plan.base.spec
    if start.earlier is None:
        write(plan.texts, files, record)
    arguments = list_arguments(start, steps)
    assembly = import_module(spec.build.__module__)
    parser = import_module(spec.script.removesuffix(".py")).setup_parser()
    objective = vars(assembly).get("build_objective")  # of flow models
    status = 1
    try:
        status = main(parser, spec.options, spec.build, arguments, latents=assembly.LATENTS, objective=objective)
    finally:
        if status == 1 and start.earlier is None and find_state(files) is None:
            remove(files)
    if status:
        return status
    state = find_state(files)
    if state is None or "end" not in state.done:  # stopped, and saved under the name of its step
        announce("To continue, give the same command again")
        return 0
    sheet = draw_strengths(plan.base.name, files)
    announce("\n".join(advise(plan, files, sheet)))
    return 0


def write(texts: RunTexts, files: Files, record: Record) -> None:
    """Write the files of a new run. Raises UserError if another process trains one of this name."""
    with holding(files):
        if not is_free(files):
            raise UserError(
                f"another run has taken the name {files.name} meanwhile; give the same command again",
                setting="--name",
                path=files.config,
                cause="would be lost",
            )
        remove_temporary(files.folder, lambda stem: stem in [path.stem for path in files.texts])
        texts.write(files, record.line)


def remove(files: Files) -> None:
    """Remove the texts of a run, unless another process trains with them."""
    with suppress(UserError), holding(files):
        for path in files.texts:
            path.unlink(missing_ok=True)


def find_state(files: Files) -> StateManifest | None:
    return newest_state(files.folder, (files.name,))


def list_arguments(start: Start, steps: int | None) -> list[str]:
    """Return the arguments of the base model's script."""
    arguments = ["--config_file", str(start.files.config)]
    if steps is not None:
        arguments += ["--max_train_steps", str(steps)]
    origin = start.origin if start.earlier is None else start.earlier.record.origin
    return [*arguments, *(["--resume", origin] if origin and find_state(start.files) is None else ["--autoresume"])]


def write_command(plan: Plan, start: Start, steps: int | None) -> str:
    """Return the command that trains as the plan says."""
    return f"python3 {plan.base.spec.script} {' '.join(map(quote, list_arguments(start, steps)))}"


def draw_strengths(base: str, files: Files) -> Path:
    """Draw the prompts at several strengths side by side, into the first folder without a sheet. Return the sheet."""
    names = (f"{files.name}-strengths{'' if number == 1 else f'-{number}'}" for number in count(1))
    folder = next(path for name in names if not (path := files.folder / name / draw.SHEET).exists()).parent
    adapter, _ = choose_adapter(files)
    words = ["--adapter", str(adapter), "--prompts", str(files.prompts), "--strengths", *STRENGTHS]
    draw.main([base, *words, "--output", str(folder), "--config_file", str(files.config)])
    return folder / draw.SHEET


def choose_adapter(files: Files) -> tuple[Path, str]:
    """Return the file to use and why: the one that the run suggests by its validation, else the last."""
    choice = read_report(Names(files.folder, files.name, "safetensors").of_report()).choice
    if choice is not None and choice["suggested"]:
        return Path(choice["suggested"]), choice["reason"]
    return files.adapter, "the last one: too few photos to measure files on, so compare the previews in the report"


def advise(plan: Plan, files: Files, sheet: Path) -> Iterator[str]:
    """Yield what to do with the adapter."""
    adapter, why = choose_adapter(files)
    yield f"Use {adapter}: {why}"
    yield (
        f"  at strength 1, as it was trained; less if the other words of a prompt get lost: {sheet} shows the prompts "
        "at several strengths"
    )
    yield f"  with {plan.trigger.word!r} in the prompt, such as {plan.trigger.text!r}"
    for program, name in FOLDERS.items():
        if program in plan.base.spec.readers:
            yield f"  {program}: copy it to {find_folder(plan.base.path, name) or f'models/{name} of {program}'}"
    longer = int(LONGER * read_num_steps(files.adapter))
    yield f"To train longer, give the same command with --steps {longer}: it goes on under a new name"


def find_folder(base: Path, name: str) -> Path | None:
    """Return the folder of adapters beside the one that the base is in, if it is that of a program."""
    return next((folder / name for folder in base.parents if (folder / name).is_dir()), None)
