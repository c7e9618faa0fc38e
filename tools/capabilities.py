"""Print the capabilities of this suite as JSON: base models, scripts, options, network modules, weight formats.

Meant for front ends that build their forms from the output; docs/capabilities.schema.json describes it.
"""

# tests/schemas.py writes the schema from the classes, docstrings and comments here.

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.scripts import BY_PROMPTS, ROOT
from library.architectures.specs import list_specs
from library.base.atomic_files import atomic_path
from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.suggestions import nearest_name
from library.base.terminal import print_json, print_line
from library.base.version import NAME, VERSION
from library.checkpoints.base_model_spec import ArgumentForm
from library.checkpoints.overwriting import FileKind, check_target, read_start
from library.commands.command import command
from library.commands.reference_page import HEAD, render_page
from library.data.concepts.prompts_file import PAIR_KEYS, SLIDER_KEYS
from library.data.description.keys import Level, Style
from library.data.description.schema import ALL_KEYS
from library.options.base import Options, is_group
from library.options.declared import Declared, PathKind, list_declared
from library.options.kinds import Range, ValueType, int_or_float
from library.options.leco import LecoOptions, list_ignored_by_leco
from library.options.machine.base_formats import BASE_FORMATS
from library.options.other_programs import SD_SCRIPTS, has_option
from library.options.training.optimizer import ScheduleOptions
from library.training.command_line.recipes import list_recipes
from library.training.optimization.lr_schedules import arguments_by_name
from library.training.optimization.optimizers import KNOWN
from networks.core.arguments.common import COMMON
from networks.core.changes.dora import DoraArguments
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.layouts import list_kinds

SCRIPTS = ("*train_network.py", "*train_leco.py")
CACHING = "src/musubi_tuner/*_cache_*.py"
TYPES: Mapping[Any, ValueType] = {str: "text", Path: "path", int: "int", float: "float", int_or_float: "steps"}
RECIPE = "recipe"
EXAMPLES = """\
  python3 tools/capabilities.py --json > capabilities.json
  python3 tools/capabilities.py --script train_network.py --json"""


@dataclass(frozen=True)
class BaseModel:
    """A base model."""

    name: str
    title: str
    script: str  # the script that trains it
    script_flag: str | None  # the option that selects it, if several base models share the script
    network_arguments: Mapping[str, ArgumentForm]  # keys of --network_args that only this base model has
    has_no_effect: Mapping[str, str]  # options of its script that have no effect on it, each with the reason


@dataclass(frozen=True)
class Limits:
    """Limits of each number of a value."""

    minimum: float | None
    exclusive_minimum: float | None
    maximum: float | None
    exclusive_maximum: float | None


@dataclass(frozen=True)
class Action:
    """An option of a tool or a caching script, or a word without a flag."""

    name: str
    flag: str | None  # None for a word without a flag
    type: ValueType  # steps: an integer number of steps, or a share of the run below 1
    is_list: bool  # it takes several values
    is_required: bool
    default: Any  # None if omitting the option has a meaning of its own, see help
    choices: Sequence[Any] | None
    help: str


@dataclass(frozen=True)
class Option(Limits, Action):
    """An option of a training script; its name is the key in a --config_file."""

    group: str  # the heading in --help_all
    group_id: str  # a name of the group that stays when its heading changes
    path_kind: PathKind | None  # a part is one of the base, a model may also be on the hub, what is new is created
    takes_other_values: bool  # values other than the choices are accepted
    needs_one_of: Sequence[str]  # else it has no effect or is refused; name=value|value if a certain value is needed
    excludes: Sequence[str]  # options with which the run is refused, in the same form
    has_no_effect: str | None  # why the option is accepted but has no effect
    is_usual: bool  # --help shows it; --help_all shows all options
    in_sd_scripts: bool  # so has sd-scripts' script of this name, up to 0.12.2, or all of its scripts if it has none


@dataclass(frozen=True)
class Script:
    """A training script."""

    name: str
    options: Sequence[Option]


@dataclass(frozen=True)
class Setting(Limits):
    """A key of a dataset file or of --network_args."""

    name: str
    type: ValueType
    is_list: bool  # the value may be a list; in --network_args separated by commas
    default: Any
    help: str


@dataclass(frozen=True)
class Key(Setting):
    """A key of --dataset_config."""

    value: str  # the form of the value, in words
    levels: Sequence[Level]  # the tables that may hold it: [general], [[datasets]], [[datasets.subsets]]
    styles: Sequence[Style]
    default_option: str | None  # the option that sets the default
    has_no_effect: str | None  # why the key is accepted but has no effect


@dataclass(frozen=True)
class Argument(Setting):
    """A key of --network_args."""

    aliases: Sequence[str]
    needs: str | None  # what else is required, in words


@dataclass(frozen=True)
class Kind:
    """A network module."""

    network_module: str  # the value of --network_module
    adapter: str  # the name of the method
    default_rank: int
    arguments: Sequence[Argument]


@dataclass(frozen=True)
class PromptKey:
    """A key with the form of its value, in words."""

    name: str
    value: str


@dataclass(frozen=True)
class PromptKeys:
    """The keys of --prompts_file (LECO) by kind of entry."""

    pair: Sequence[PromptKey]
    slider: Sequence[PromptKey]


@dataclass(frozen=True)
class Command:
    """A tool, or a script that encodes images and captions before a training."""

    name: str
    description: str | None
    options: Sequence[Action]


@dataclass(frozen=True)
class Capabilities:
    """Output of `python3 tools/capabilities.py --json`. Later versions may add fields; none changes its meaning."""

    name: str
    version: str
    base_models: Sequence[BaseModel]
    scripts: Sequence[Script]
    network_modules: Sequence[Kind]
    base_formats: Sequence[str]  # the values of --base_format
    dataset_keys: Sequence[Key]
    prompts_file_keys: PromptKeys
    caching_scripts: Sequence[Command]
    tools: Sequence[Command]


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON; unset: a short list to read")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write all settings as a Markdown page, anew")
    parser.add_argument("--script", help="only the options of this script, such as train_network.py")
    return parser


def list_capabilities(scripts: Sequence[str]) -> dict[str, Any]:
    """Return the capabilities as values of JSON, with the options of the given scripts."""
    capabilities = Capabilities(
        NAME,
        VERSION,
        base_models=[
            BaseModel(s.name, s.title, s.script, s.script_flag or None, dict(s.network_arguments), dict(s.ignores))
            for s in list_specs()
        ],
        scripts=[Script(name, list(describe_options(name))) for name in scripts],
        network_modules=[describe_kind(kind) for kind in list_kinds() if kind.network_module],
        base_formats=BASE_FORMATS,
        dataset_keys=[describe_key(key) for key in ALL_KEYS.values()],
        prompts_file_keys=PromptKeys(
            *([PromptKey(name, kind.name) for name, kind in keys.items()] for keys in (PAIR_KEYS, SLIDER_KEYS))
        ),
        caching_scripts=[describe_command(path) for path in sorted(ROOT.glob(CACHING))],
        tools=[describe_command(path) for path in list_tools()],
    )
    return asdict(capabilities)


def describe_options(script: str) -> Iterator[Option]:
    """Yield a description of every option of a script, combining its parser and its declaration."""
    parser = importlib.import_module(script.removesuffix(".py")).setup_parser()
    specs = [spec for spec in list_specs() if script in (spec.script, spec.prompts_script)]
    kinds: list[type[Options]] = [LecoOptions, *(spec.options for spec in specs)]
    declarations = {name: declared for kind in kinds for name, declared in kind.declarations().items()}
    group_ids = {heading: name for kind in kinds for heading, name in list_groups(kind)}
    # An option that one of the script's base models obeys has an effect.
    ignored = {name: why for name, why in specs[0].ignores.items() if all(name in spec.ignores for spec in specs)}
    if script.endswith(BY_PROMPTS):
        ignored |= {name: why for kind in kinds for name, why in list_ignored_by_leco(kind).items()}
    known = {
        "optimizer_type": list(KNOWN),
        "lr_scheduler": list(arguments_by_name(ScheduleOptions(), 0, 0, 1)),
        "network_module": [kind.network_module for kind in list_kinds() if kind.network_module],
        RECIPE: [recipe.name for recipe in list_recipes() if recipe.script == script],
    }
    # argparse has no public way to list the groups of a parser.
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest != "help":
                name, title = action.dest, str(group.title)
                described = describe_option(action, declarations[name], ignored.get(name), known.get(name))
                is_in_sd_scripts = has_option(SD_SCRIPTS, script, name)
                yield Option(group=title, group_id=group_ids[title], in_sd_scripts=is_in_sd_scripts, **described)


def list_groups(kind: type[Options], name: str = "script") -> Iterator[tuple[str, str]]:
    """Yield (heading in the help, stable name) of every group of options."""
    yield kind.heading(), name
    for field, hint in kind.typed_fields():
        if is_group(hint):
            yield from list_groups(hint, field.name)


def describe_option(
    action: argparse.Action, declared: Declared, ignored: str | None, known: Sequence[str] | None
) -> dict[str, Any]:
    """Return what parser and declaration say of an option; `known` lists values of one that has no fixed choices."""
    described = describe_action(action)
    return {
        **vars(described),
        **describe_range(declared.range),
        "type": "path" if declared.path else described.type,
        "choices": known if action.choices is None else described.choices,
        "path_kind": declared.path,
        "takes_other_values": known is not None and action.dest != RECIPE,
        "needs_one_of": declared.requires or declared.needs.names,
        "excludes": sorted(declared.excludes),
        "has_no_effect": declared.ignored or ignored,
        "is_usual": declared.usual,
    }


def describe_action(action: argparse.Action) -> Action:
    """Return what a parser knows of an option or, if its flag is None, of a positional argument."""
    return Action(
        name=action.dest,
        flag=action.option_strings[0] if action.option_strings else None,
        type="flag" if action.nargs == 0 else TYPES.get(action.type or str, "text"),
        is_list=action.nargs not in (None, 0, "?"),
        is_required=action.required,
        default=None if action.default is argparse.SUPPRESS else action.default,
        choices=None if action.choices is None else list(action.choices),
        help=(action.help or "").replace("%%", "%"),
    )


def describe_command(path: Path) -> Command:
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    parser = importlib.import_module(name.replace("/", ".")).setup_parser()
    actions = [action for action in parser._actions if action.dest not in ("help", "version")]
    return Command(f"{name}.py", parser.description, [describe_action(action) for action in actions])


def list_training_scripts() -> list[str]:
    return sorted(path.name for pattern in SCRIPTS for path in ROOT.glob(pattern))


def list_tools() -> Iterator[Path]:
    """Yield the tools; other modules in their folder have no parser."""
    for path in sorted((ROOT / "tools").glob("*.py")):
        setup = getattr(importlib.import_module(f"tools.{path.stem}"), "setup_parser", None)
        if setup is not None and all(p.default is not p.empty for p in inspect.signature(setup).parameters.values()):
            yield path


def describe_key(key: Declared) -> Key:
    described = {**describe_declared(key), "levels": key.levels, "styles": key.styles, "has_no_effect": key.ignored}
    return Key(value=key.kind.name, default_option=key.flag, **described)


def describe_declared(declared: Declared) -> dict[str, Any]:
    """Return the fields of `Setting`."""
    kind, said = declared.kind, {"default": declared.default, "help": declared.help}
    return {"name": declared.name, "type": kind.type, "is_list": kind.is_list, **describe_range(kind.range), **said}


def describe_range(range: Range) -> dict[str, Any]:
    """Return the fields of `Limits`."""
    return vars(Limits(range.at_least, range.above, range.at_most, range.below))


def describe_kind(kind: AdapterKind) -> Kind:
    """Return an adapter kind with the network arguments that it accepts."""
    groups = (*COMMON, DoraArguments, *kind.wrappers, kind.arguments)
    declared = [a for group in groups for name, a in list_declared(group).items() if name not in kind.refuses]
    arguments = [Argument(**describe_declared(a), aliases=a.aliases, needs=a.needs.words or None) for a in declared]
    return Kind(kind.network_module, kind.layouts[0].words, kind.default_rank, arguments)


def is_page(path: Path) -> bool:
    """Return True for a page that --docs wrote."""
    return read_start(path).startswith(HEAD[:200].encode())


def show(capabilities: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the short, human-readable list."""
    yield f"{capabilities['name']} {capabilities['version']}"
    for model in capabilities["base_models"]:
        yield f"  {model['title']:24} {model['script']} {model['script_flag'] or ''}".rstrip()
    for module in capabilities["network_modules"]:
        yield f"  --network_module {module['network_module']:16} {module['adapter']}"
    yield f"  --base_format {', '.join(capabilities['base_formats'])}"
    for script in capabilities["scripts"]:
        yield f"  {script['name']}: {len(script['options'])} options"


def print_capabilities(args: argparse.Namespace) -> None:
    """Print the capabilities. Raises UserError for an unknown script."""
    scripts = list_training_scripts()
    if args.script and args.script not in scripts:
        suggestion = nearest_name(args.script, scripts)
        raise about("--script")(f"{args.script} is not a training script", f"use {suggestion or ', '.join(scripts)}")
    capabilities = list_capabilities([args.script] if args.script else scripts)
    if args.docs is not None:
        path, page = args.docs, render_page(list_capabilities(scripts))
        check_target("--docs", path, FileKind("a page of settings", is_page))
        with atomic_path(path) as unfinished:
            unfinished.write_text(page, encoding="utf-8", newline="\n")
    elif args.json:
        print_json(capabilities)
    else:
        print_line("\n".join(show(capabilities)))


main = command(setup_parser, print_capabilities)

if __name__ == "__main__":
    sys.exit(main())
