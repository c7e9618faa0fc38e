"""Translation of another trainer's settings into options, a dataset file and prompts of a script here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from library.data.description.schema import ALL_KEYS
from library.options.declared import Declared
from library.options.kinds import is_finite_number
from library.options.other_programs import DATA_TABLES, Equivalent, read_names, read_whole_program
from library.translation.configuration import Configuration, Setting
from library.translation.conversions import BY_NAME, Unanswered
from library.translation.draft import Draft, How, Line, Outcome, find_script, is_off, list_options, to_word
from library.translation.finishing import finish, forget_weak, render_prompts, split_resolutions
from library.translation.shell import read_options

SECRET = "a password or token is never copied; log in to the service, or give --{} on the command line"
NEVER = "is never taken over from a file of another program; add --{} yourself if you want it"
NEVER_TAKEN = (
    "trust_remote_code", "huggingface_repo_id", "huggingface_repo_type", "huggingface_repo_visibility",
    "huggingface_path_in_repo", "save_state_to_huggingface", "resume_from_huggingface", "async_upload",
)  # fmt: skip
NUMBERS = ("int", "float", "steps")  # types of settings
RUN_SETTINGS = ("config_file", "output_config", "yes", "recipe")  # of a command line, not of a training


@dataclass(frozen=True)
class Translation:
    """The options, dataset tables and prompts here that stand for another trainer's file."""

    title: str  # of the other trainer
    script: str  # that trains it, or "" if the file does not say
    options: Mapping[str, Line]
    datasets: tuple[Mapping[str, Any], ...]  # tables of a dataset file, with Lines as values; empty: no dataset file
    prompts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    remarks: tuple[str, ...] = ()

    @property
    def missing(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.how == "missing"]

    @property
    def values(self) -> dict[str, Any]:
        return {name: line.value for name, line in self.options.items()}


def translate(configuration: Configuration, script: str = "") -> Translation:
    """Translate settings for the script that they name, or for `script` if they name none."""
    program = read_whole_program(configuration.program)
    own = {setting.name: setting.value for setting in configuration.settings if setting.subset is None}
    script, *flag = (find_script(program, own, configuration.script) or script).split(" ")
    defaults = program.list_defaults(script, configuration.script)
    defaults = {name: refer(value, {**defaults, **own}) for name, value in defaults.items()}
    all_values = {setting.name: setting.value for setting in configuration.settings}
    draft = Draft(program, script, list_options(script), {**defaults, **all_values})
    for name, value in read_options(flag):
        draft.options[name] = Line(value, ("the base model",))
    outcomes = [apply(setting, draft) for setting in configuration.settings]
    sets = sorted({setting.subset for setting in configuration.settings if setting.subset is not None})
    for setting in list_unset(defaults, configuration.settings, sets):
        apply(setting, draft, f"{program.title}'s default {setting.name}")
    for name, value in program.list_always(script).items():
        if name in draft.known:
            draft.put(draft.options, name, Line(value, (f"as {program.title} trains",), is_weak=True))
    finish(draft)
    datasets, prompts = split_resolutions(draft), render_prompts(draft)
    return Translation(
        program.title,
        script,
        draft.options,
        datasets,
        prompts,
        tuple(outcomes),
        (*configuration.remarks, *program.list_remarks(script)),
    )


def refer(default: Any, own: Mapping[str, Any]) -> Any:
    """Return a default; "=name" is the value of another setting."""
    is_reference = isinstance(default, str) and default.startswith("=")
    return own.get(default[1:]) if is_reference else default


def list_unset(defaults: Mapping[str, Any], settings: tuple[Setting, ...], sets: list[int]) -> Iterator[Setting]:
    """Yield the other trainer's defaults of what a file does not set; those of images for each set of them."""
    for name, value in defaults.items():
        subsets = sets if name.startswith(DATA_TABLES) and sets else [None]
        for subset in subsets:
            if not any(setting.name == name and setting.subset == subset for setting in settings):
                yield Setting(name, value, name, subset)


def apply(setting: Setting, draft: Draft, default: str = "") -> Outcome:
    """Add a setting to the draft, and say what became of it; `default` describes one that the file does not set."""

    def outcome(how: How, text: str = "") -> Outcome:
        return Outcome(setting.name, setting.value, setting.place, how, text)

    entry = read_names(draft.program.key).get(setting.name)
    value = setting.value
    if setting.name in RUN_SETTINGS:
        return outcome("idle")
    if entry is None:
        text = f"{draft.program.title}'s setting is not known here"
        return outcome("idle") if is_off(value) or value == 0 else outcome("missing", text)
    if entry.none and to_word(value) in draft.program.base.get(setting.name, {}):
        return outcome("equal", f"{draft.script} trains it")
    if not draft.meets(entry.only_with):
        return outcome("missing", entry.otherwise) if entry.otherwise else outcome("idle")
    if isinstance(entry.same, list) and to_word(value) in map(to_word, entry.same):
        return outcome("equal", entry.none)
    if entry.same is True:
        return outcome("idle", entry.none)
    if entry.none:
        return outcome("idle") if is_off(value) or value == 0 else outcome("missing", entry.none)
    try:
        return outcome(*add(value, entry, setting, draft, default))
    except Unanswered as error:
        return outcome("missing", str(error))


def add(value: Any, entry: Equivalent, setting: Setting, draft: Draft, default: str) -> tuple[How, str]:
    """Add the value of an entry that has an equal; return what became of it. Raises Unanswered if it has none."""
    how: How = "equal"
    origins, is_weak = (default or setting.place,), bool(default)
    if entry.values:
        by_word = {word.lower(): replacement for word, replacement in entry.values.items()}
        word = to_word(value).lower()
        if by_word.get(word, "") is None:
            raise Unanswered(f"there is no such choice here; {describe_default(entry, draft)}")
        if isinstance(several := by_word.get(word), dict):
            return add_several(several, entry, origins, draft)
        value = by_word.get(word, value)
        how = "equal" if word == to_word(value).lower() else "converted"
    if entry.convert != "negate" and (is_off(value) or (value == 0 and entry.zero_is_off)):
        # A file that switches something off does so also where a default of the same name switches it on.
        forget_weak(draft, *entry.options)
        return "idle", ""
    if entry.value is not None:
        value, how = entry.value, "converted"
    if entry.convert:
        try:
            value, how = BY_NAME[entry.convert](value, entry, setting, draft), "converted"
        except (TypeError, ValueError, ArithmeticError) as error:
            raise Unanswered(f"{draft.program.title} has no such value for it") from error
    if value is not None:
        place(value, entry, setting, draft, Line(value, origins, is_weak))
    add_companions(entry, setting, draft, origins)
    return ("converted" if entry.beside else how), ""


def add_companions(entry: Equivalent, setting: Setting, draft: Draft, origins: tuple[str, ...]) -> None:
    """Add the settings that go with one, where the script has them."""
    for name, companion in entry.beside.items():
        table = draft.options if name in draft.known else draft.arguments if entry.argument else draft.general
        if entry.key and setting.subset is not None:
            table = draft.subsets.setdefault(setting.subset, {})
        if table is not draft.general or entry.key:
            draft.put(table, name, Line(companion, origins, is_weak=True))


def place(value: Any, entry: Equivalent, setting: Setting, draft: Draft, line: Line) -> None:
    """Put a value where its entry says. Raises Unanswered for what the script lacks, or what is never taken over."""
    if entry.key:
        require_number(line.value, ALL_KEYS[entry.key])
        table = draft.general if setting.subset is None else draft.subsets.setdefault(setting.subset, {})
        draft.put(table, entry.key, line)
    elif entry.argument:
        draft.put(draft.arguments, entry.argument, line)
    elif entry.optimizer:
        # Both values of a pair come one after the other.
        draft.optimizer[entry.optimizer] = line
    elif entry.prompt:
        draft.letters[draft.program.name_letter(draft.script, entry.prompt)] = value
    else:
        put_option(entry, draft, line)


def put_option(entry: Equivalent, draft: Draft, line: Line) -> None:
    name = draft.find_option(entry)
    if name is None:
        raise Unanswered(f"{draft.script} has no option --{' or --'.join(entry.options)}")
    declared = draft.known[name]
    if declared.secret:
        raise Unanswered(SECRET.format(name))
    if name in NEVER_TAKEN:
        raise Unanswered(NEVER.format(name))
    if declared.unsupported is not None and not declared.needs.names:
        raise Unanswered(f"--{name} is refused: {declared.unsupported}")
    require_number(line.value, declared)
    if declared.choices is not None and not declared.takes_other_values and line.value not in declared.choices:
        raise Unanswered(f"{line.value} is no choice of --{name}; {describe_default(entry, draft)}")
    draft.put(draft.options, name, line)


def require_number(value: Any, declared: Declared) -> None:
    """Raise Unanswered for a value of a setting of numbers that has none; their range is checked by the run."""
    kind = declared.kind
    if kind.type in NUMBERS and not is_numeric(value, takes_lists=bool(kind.is_list or declared.nargs)):
        raise Unanswered(f"{value!r} is not {kind.name}; {declared.name} is not set")


def is_numeric(value: Any, takes_lists: bool) -> bool:
    """Return True for a number or percentage, also as text; with `takes_lists` for several, in text between commas."""
    if isinstance(value, list | tuple) and takes_lists:
        return all(is_numeric(part, takes_lists) for part in value)
    if not isinstance(value, str):
        return is_finite_number(value)
    try:
        parts = value.split(",") if takes_lists else [value]
        return all(isfinite(float(part.strip().removesuffix("%"))) for part in parts)
    except ValueError:
        return False


def add_several(
    values: Mapping[str, Any], entry: Equivalent, origins: tuple[str, ...], draft: Draft
) -> tuple[How, str]:
    """Add the options, and arguments of the optimizer, that one word of another trainer stands for."""
    is_optimizer = "optimizer_type" in entry.options
    for name, value in values.items():
        if name not in draft.known and not is_optimizer:
            raise Unanswered(f"{draft.script} has no option --{name}")
        draft.put(draft.options if name in draft.known else draft.optimizer, name, Line(value, origins, is_weak=True))
    return "converted", ""


def describe_default(entry: Equivalent, draft: Draft) -> str:
    """Say what holds where an option is not set."""
    name = draft.find_option(entry)
    if name is None:
        return "nothing is set"
    always = draft.program.list_always(draft.script).get(name, draft.known[name].default)
    return f"--{name} stays unset" if always in (None, False, "") else f"--{name} is {always}"
