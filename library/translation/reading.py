"""Recognition of other trainers' files by their content. Nothing of a file is run, and no pickle is read."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.base.errors import about, naming, of_file
from library.base.json_text import InvalidJson, parse_json
from library.checkpoints.headers import WEIGHT_SUFFIXES, holds_safetensors
from library.options.config_file import read_text
from library.options.other_programs import MUSUBI_TUNER, SD_SCRIPTS, read_program, read_whole_program
from library.translation.adapter_metadata import read_adapter
from library.translation.configuration import Configuration, Setting, flatten, flatten_list
from library.translation.shell import Command, read_commands, read_options, split_words, to_number

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AI_TOOLKIT, ONETRAINER, SIMPLETUNER, DIFFUSERS, KOHYA_SS, LORA_EASY = (
    "ai_toolkit", "onetrainer", "simpletuner", "diffusers", "kohya_ss", "lora_easy",
)  # fmt: skip
MOST_BYTES = 4 << 20  # of a text file
MOST_VALUES = 100_000  # of a YAML file, whose aliases repeat others
WORDS_OF_KOHYA_SS = {"optimizer_args", "lr_scheduler_args"}  # in one text
LYCORIS = "lycoris_config"  # of SimpleTuner: a file
ADDITIONAL = "additional_parameters"  # of kohya_ss: a text with options of sd-scripts
VERSION = 11  # of OneTrainer's files, that names/onetrainer.json knows
PROCESSES = ("sd_trainer", "diffusion_trainer", "ui_trainer")  # of ai-toolkit, that train adapters
CONFIG_EXTENSION = ".toml"
SUBSETS = {
    **dict.fromkeys(
        (
            "instance_data_dir",
            "instance_prompt",
            "train_data_dir",
            "dataset_name",
            "dataset_config_name",
            "image_column",
            "caption_column",
        ),
        0,
    ),
    **dict.fromkeys(("with_prior_preservation", "class_data_dir", "class_prompt"), 1),
}


def read_configuration(path: Path, flag: str) -> Configuration | None:
    """Return the settings of another trainer's file; None if it is none. `flag` is the option that names the file.

    Raises UserError if the file is missing, unreadable, or is of a trainer but trains no adapter.
    """
    if path.is_file() and path.suffix.lower() in WEIGHT_SUFFIXES:
        if not holds_safetensors(path):
            raise about(flag, path)("is no .safetensors file; other weight files may run code when they are opened")
        return read_adapter(path, read_tables)
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise about(flag, path)(f"is larger than {MOST_BYTES >> 20} MiB; this is no configuration of a training")
    text = read_text(path, flag)
    with naming(flag, path, file=path):
        tables = parse_tables(text, path)
        found = None if tables is None else read_tables(tables, path)
        found = found or read_command_lines(text)
        if found is None and tables is None and text.lstrip().startswith(("{", "//", "/*")):
            refuse_damaged(text, path)
        return found


def refuse_damaged(text: str, path: Path) -> None:
    """Raise UserError for text that looks like JSON and is none, such as one with comments."""
    try:
        parse_json(text)
    except InvalidJson as error:
        reason = f"is no JSON, which it begins as: {error}"
        raise of_file(path, cause="unreadable")(reason, "mend it; JSON has no comments") from None


def parse_tables(text: str, path: Path) -> Any:
    """Return the content of JSON, TOML or YAML; None for other text."""
    if text.lstrip().startswith(("{", "[")) and path.suffix.lower() != CONFIG_EXTENSION:
        try:
            return parse_json(text)
        except InvalidJson:
            pass
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        pass
    import yaml  # few starts need it

    try:
        tables = yaml.safe_load(text)
        num_values = count_values(tables, {})
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if num_values > MOST_VALUES:
        raise of_file(path, cause="wrong value")(f"has more than {MOST_VALUES} values by its aliases")
    return tables


def count_values(value: Any, known: dict[int, int]) -> int:
    """Return the number of values inside YAML's, those of an alias at each of its places; more than allowed for a
    value inside itself. `known` has the counts of lists and tables by their identity."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # until it is counted
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(count_values(part, known) for part in parts)
    return known[id(value)]


def read_tables(tables: Any, path: Path) -> Configuration | None:
    """Return the settings of parsed tables, by the trainer that has such names; None if there is none."""
    if not isinstance(tables, dict):
        return None
    names = {str(key).removeprefix("--") for key in tables}
    inner = tables.get("config")
    if isinstance(inner, dict) and "process" in inner:
        return read_ai_toolkit(inner, path)
    readers: Mapping[str, Callable[[Mapping[str, Any], Path], Configuration]] = {
        "LoRA_type": read_kohya_ss, "training_method": read_onetrainer, "base_model_name": read_onetrainer,
        "model_family": read_simpletuner, "data_backend_config": read_simpletuner, "train_mode": read_lora_easy,
        "general_args": read_lora_easy,
    }  # fmt: skip
    if isinstance(inner, dict) and "--model_family" in inner:
        return read_simpletuner(inner, path)
    return next((read(tables, path) for name, read in readers.items() if name in names), None) or read_toml(
        tables, path
    )


def read_ai_toolkit(config: Mapping[str, Any], path: Path) -> Configuration:
    processes = config["process"] if isinstance(config["process"], list) else [config["process"]]
    process = processes[0] if processes and isinstance(processes[0], dict) else {}
    kind, names = process.get("type"), read_program(AI_TOOLKIT).keys()
    remarks = []
    if "slider" in process or kind in ("textual_inversion", "extract", "generate"):
        raise of_file(path, cause="does not fit")(
            f"is no training on images (process type {kind})",
            "train sliders with train_leco.py, or with --pair_slider of a training script",
        )
    if kind not in PROCESSES:
        remarks.append(f"ai-toolkit's process type {kind} is not known; settings are read as those of {PROCESSES[0]}")
    if len(processes) > 1:
        remarks.append(f"only the first of {len(processes)} processes is read")
    place, sets = "config.process[0].", process.get("datasets")
    outer = {key: value for key, value in config.items() if key not in ("process",)}
    own = {key: value for key, value in process.items() if key not in ("datasets", "type")}

    def settings() -> Iterator[Setting]:
        yield from flatten(outer, names, place="config.")
        yield from flatten(own, names, place=place)
        yield from flatten_list(sets, names, "datasets", f"{place}datasets")

    # YAML takes 1e-4 for a text.
    read = (replace(s, value=to_number(s.value)) if isinstance(s.value, str) else s for s in settings())
    return Configuration(AI_TOOLKIT, tuple(read), remarks=tuple(remarks))


def read_onetrainer(config: Mapping[str, Any], path: Path) -> Configuration:
    names, remarks = read_program(ONETRAINER).keys(), list[str]()
    version = config.get("__version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        remarks.append(f"the file has version {version} of OneTrainer's settings; names are known up to {VERSION}")
    concepts = config.get("concepts") or read_named_list(config, "concept_file_name", path, remarks)
    own = {key: value for key, value in config.items() if key not in ("concepts", "concept_file_name", "__version")}

    def settings() -> Iterator[Setting]:
        yield from flatten(own, names)
        yield from flatten_list(concepts, names, "concepts", "concepts")

    return Configuration(ONETRAINER, tuple(settings()), remarks=tuple(remarks))


def read_simpletuner(config: Mapping[str, Any], path: Path) -> Configuration:
    names, remarks = read_program(SIMPLETUNER).keys() - {LYCORIS}, list[str]()
    own = {str(key).removeprefix("--"): value for key, value in config.items()}
    own[LYCORIS] = read_named(own, LYCORIS, path) or own.get(LYCORIS)
    backends = read_named_list(own, "data_backend_config", path, remarks)
    images = [b for b in backends if isinstance(b, dict) and b.get("dataset_type", "image") == "image"]

    def settings() -> Iterator[Setting]:
        yield from flatten({key: value for key, value in own.items() if key != "data_backend_config"}, names)
        yield from flatten_list(images, names, "data_backend", "data_backend")

    return Configuration(SIMPLETUNER, tuple(settings()), remarks=tuple(remarks))


def read_named_list(config: Mapping[str, Any], name: str, path: Path, remarks: list[str]) -> list[Any]:
    """Return the JSON list in the file that a setting names, looked for where the trainer does and beside `path`."""
    content = read_named(config, name, path)
    if content is None and config.get(name):
        remarks.append(
            f"{name} is {config[name]}, which is not there: write your folder of images into the dataset file"
        )
    return content if isinstance(content, list) else []


def read_named(config: Mapping[str, Any], name: str, path: Path) -> Any:
    """Return the JSON in the file that a setting names, as `read_named_list` looks for it; None without such a file."""
    given = config.get(name)
    if not isinstance(given, str) or not given:
        return None
    candidates = [Path(given), *(folder / given for folder in path.absolute().parents), path.parent / Path(given).name]
    found = None
    with suppress(OSError, ValueError):  # no path can be so long, or has such a character
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
    return None if found is None else parse_json(found.read_text(encoding="utf-8-sig"))


def read_kohya_ss(config: Mapping[str, Any], path: Path) -> Configuration:
    # Its forms write numbers as text.
    values = {key: to_number(value) if isinstance(value, str) else value for key, value in config.items()}
    for name in WORDS_OF_KOHYA_SS & values.keys():
        values[name] = str(values[name]).replace('"', "").split()
    more = read_options(split_words(str(values.pop(ADDITIONAL, "") or "")))
    settings = (
        *flatten(values, values.keys()),
        *(Setting(name, value, f"{ADDITIONAL} --{name}") for name, value in more),
    )
    return Configuration(KOHYA_SS, settings)


def read_lora_easy(tables: Mapping[str, Any], path: Path) -> Configuration:
    """Return the settings as its server passes them to sd-scripts: what is empty or zero in the data is left out."""
    sections = {name: table for name, table in tables.items() if isinstance(table, dict)}
    own, data = join_parts(sections, "args"), join_parts(sections, "dataset_args")
    own["network_module"] = choose_network_module(own)
    for name in ("network_args", "optimizer_args", "lr_scheduler_args"):
        if isinstance(own.get(name), dict):
            own[name] = [f"{key}={to_words(value)}" for key, value in own[name].items()]
    written = {name: fill_in(value, str(own.get("easy_name", ""))) for name, value in own.items() if name != "fa"}
    if isinstance(data.get("resolution"), list):
        data["resolution"] = [data["resolution"]]  # one size; a list has several
    listed = tables.get("subsets")
    subsets = [{name: value for name, value in one.items() if value} for one in listed or () if isinstance(one, dict)]
    names, mode = written.keys(), sections.get("train_mode", {}).get("train_mode", "lora")
    marks = {name: True for name in sections if name in read_whole_program(LORA_EASY).base and name != "train_mode"}

    def settings() -> Iterator[Setting]:
        yield from flatten({**written, **marks, "train_mode": mode}, names)
        yield from flatten({name: value for name, value in data.items() if value}, names, "datasets.")
        yield from flatten_list(subsets, names, "datasets", "subsets")

    return Configuration(LORA_EASY, tuple(settings()))


def join_parts(sections: Mapping[str, Any], part: str) -> dict[str, Any]:
    tables = [section[part] for section in sections.values() if isinstance(section.get(part), dict)]
    return {name: value for table in tables for name, value in table.items()}


def choose_network_module(own: Mapping[str, Any]) -> str:
    """Return the module that LoRA_Easy_Training_Scripts' server takes for a form."""
    arguments = own.get("network_args") or {}
    if "unit" in arguments:
        return "networks.dylora"
    if "algo" in arguments:
        return "lycoris.kohya"
    return "networks.lora_fa" if own.get("fa") else "networks.lora"


def to_words(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def fill_in(value: Any, name: str) -> Any:
    """Put the name of a run in place of ${replace}."""
    return value.replace("${replace}", name) if isinstance(value, str) else value


def read_toml(tables: Mapping[str, Any], path: Path) -> Configuration | None:
    """Return the settings of a config file of sd-scripts or musubi-tuner, whose sections only group lines."""
    flat = {
        key: value
        for name, section in tables.items()
        for key, value in (section.items() if isinstance(section, dict) else [(name, section)])
    }
    known = {program: flat.keys() & read_program(program).keys() for program in (SD_SCRIPTS, MUSUBI_TUNER)}
    program = max(known, key=lambda program: len(known[program]))
    if not known[program] or "datasets" in flat:
        return None
    return Configuration(program, tuple(flatten(flat, flat.keys())))


def read_command_lines(text: str) -> Configuration | None:
    """Return the settings of the first training command of a shell script; None without one."""
    commands = read_commands(text)
    if not commands:
        return None
    command, remarks = commands[0], list[str]()
    if len(commands) > 1:
        remarks.append(f"only the first of {len(commands)} training commands is read: {command.script}")
    if command.unknown_variables:
        remarks.append(f"variables that the file does not set stay as they are: {', '.join(command.unknown_variables)}")
    if command.comment:
        remarks.append(f"behind a # in a command a shell reads nothing, and so it is here: {command.comment[:80]}")
    options = dict(command.options)
    for name, value in command.launch_options:
        if name == "mixed_precision":
            options.setdefault(name, value)
        elif name in ("num_processes", "multi_gpu", "num_machines") and value not in (0, 1):
            remarks.append(f"start it with accelerate launch --{name} {value}")
    program = find_program(command)
    subsets = SUBSETS if program == DIFFUSERS else {}
    settings = tuple(Setting(name, value, f"--{name}", subsets.get(name)) for name, value in options.items())
    return Configuration(program, settings, command.script, tuple(remarks))


def find_program(command: Command) -> str:
    """Return the program of a training command: by its script, and by options where scripts have one name."""
    if command.script.startswith(("train_dreambooth", "train_text_to_image")):
        return DIFFUSERS
    names = {name for name, _ in command.options}
    unknown = {program: len(names - read_program(program).keys()) for program in (SD_SCRIPTS, MUSUBI_TUNER)}
    return min(unknown, key=lambda program: unknown[program])
