"""The run itself, through the base model's own script, and what to do with its files."""

from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path

from library.checkpoints.base_model_spec import Program
from library.checkpoints.overwriting import check_target
from library.requirements import quote
from library.training.command_line.main import main
from library.training.report_page.writer import read_report
from library.training.reporting.console_lines import announce
from library.training.saving.names import Names
from library.training.saving.saved_files import read_num_steps
from tools import draw
from tools.front_door.plan import TEXT_KIND, Files, Plan

STRENGTHS = ("0", "0.5", "0.75", "1")
LONGER = 1.5  # times the steps, in the command that continues
FOLDERS: dict[Program, str] = {"ComfyUI": "loras", "Forge": "Lora"}  # in the program's folder of models


def choose_files(output_dir: Path | None, name: str | None, usual: str) -> Files:
    """Return the files of the run; without a name, those of the first name that is free.

    Raises UserError if `name` has files that no run of this command wrote.
    """

    def files_of(candidate: str) -> Files:
        return Files((output_dir or Path("output") / candidate).absolute(), candidate)

    if name is None:
        numbered = (files_of(usual if number == 1 else f"{usual}-{number}") for number in count(1))
        return next(f for f in numbered if not any(path.exists() for path in (*f.texts, f.adapter)))
    files = files_of(name)
    for path in files.texts:
        check_target("--name", path, TEXT_KIND)
    if not files.config.exists():
        check_target("--name", files.adapter, Names(files.folder, name, "safetensors").adapter_kind)
    return files


def train(plan: Plan, files: Files) -> int:
    """Write the run's files, train, draw and say what to do with the adapter. Return the exit status."""
    files.folder.mkdir(parents=True, exist_ok=True)
    plan.write(files)
    spec, before = plan.base.spec, stamp_of(files.adapter)
    assembly = import_module(spec.build.__module__)
    parser = import_module(spec.script.removesuffix(".py")).setup_parser()
    arguments = ["--config_file", str(files.config)]
    objective = vars(assembly).get("build_objective")  # of flow models
    status = main(parser, spec.options, spec.build, arguments, latents=assembly.LATENTS, objective=objective)
    if status:
        return status
    if stamp_of(files.adapter) == before:  # stopped, and saved under the name of its step
        announce(f"To continue: {continue_command(plan, files)}")
        return 0
    sheet = draw_strengths(plan, files)
    announce("\n".join(advise(plan, files, sheet)))
    return 0


def stamp_of(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def continue_command(plan: Plan, files: Files, steps: int | None = None) -> str:
    longer = "" if steps is None else f" --max_train_steps {steps}"
    return f"python3 {plan.base.spec.script} --config_file {quote(files.config)} --autoresume{longer}"


def draw_strengths(plan: Plan, files: Files) -> Path:
    """Draw the prompts at several strengths side by side, into the first free folder. Return the sheet."""
    names = (f"{files.name}-strengths{'' if number == 1 else f'-{number}'}" for number in count(1))
    folder = next(path for name in names if not (path := files.folder / name).exists())
    adapter, _ = choose_adapter(files)
    words = ["--adapter", str(adapter), "--prompts", str(files.prompts), "--strengths", *STRENGTHS]
    draw.main([plan.base.name, *words, "--output", str(folder), "--config_file", str(files.config)])
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
    steps = read_num_steps(files.adapter)
    yield f"To train longer: {continue_command(plan, files, int(LONGER * steps))}"


def find_folder(base: Path, name: str) -> Path | None:
    """Return the folder of adapters beside the one that the base is in, if it is that of a program."""
    return next((folder / name for folder in base.parents if (folder / name).is_dir()), None)
