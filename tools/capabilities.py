"""Print the capabilities of this suite as JSON: base models, scripts, options, network modules, weight formats.

Meant for front ends that build their forms from the output; docs/capabilities.schema.json describes it.
"""

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from library.checkpoints.overwriting import FileKind, check_target, read_start
from library.commands.command import command
from library.commands.reference_page import HEAD, render_page
from library.data.concepts.prompts_file import PAIR_KEYS, SLIDER_KEYS
from library.data.description.schema import ALL_KEYS
from library.options.base import Options, is_group
from library.options.declared import Declared, list_declared
from library.options.kinds import Range, int_or_float
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
TYPES = {str: "text", Path: "path", int: "int", float: "float", int_or_float: "steps"}
RECIPE = "recipe"
EXAMPLES = """\
  python3 tools/capabilities.py --json > capabilities.json
  python3 tools/capabilities.py --script train_network.py --json"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON; unset: a short list to read")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write all settings as a Markdown page, anew")
    parser.add_argument("--script", help="only the options of this script, such as train_network.py")
    return parser


def list_capabilities(scripts: Sequence[str]) -> dict[str, Any]:
    """Return the object that docs/capabilities.schema.json describes, with the options of the given scripts."""
    return {
        "name": NAME,
        "version": VERSION,
        "base_models": [
            {
                "name": spec.name,
                "title": spec.title,
                "script": spec.script,
                "script_flag": spec.script_flag or None,
                "network_arguments": dict(spec.network_arguments),
                "has_no_effect": dict(spec.ignores),
            }
            for spec in list_specs()
        ],
        "scripts": [{"name": name, "options": list(describe_options(name))} for name in scripts],
        "network_modules": [describe_kind(kind) for kind in list_kinds() if kind.network_module],
        "base_formats": list(BASE_FORMATS),
        "dataset_keys": [describe_key(key) for key in ALL_KEYS.values()],
        "prompts_file_keys": describe_prompt_keys(),
        "caching_scripts": [describe_command(path) for path in sorted(ROOT.glob(CACHING))],
        "tools": [describe_command(path) for path in list_tools()],
    }


def describe_options(script: str) -> Iterator[dict[str, Any]]:
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
                yield describe_option(
                    action, declarations[action.dest], ignored.get(action.dest), known.get(action.dest)
                ) | {
                    "group": group.title,
                    "group_id": group_ids[group.title],
                    "in_sd_scripts": has_option(SD_SCRIPTS, script, action.dest),
                }


def list_groups(kind: type[Options], name: str = "script") -> Iterator[tuple[str, str]]:
    """Yield (heading in the help, stable name) of every group of options."""
    yield kind.heading(), name
    for field, hint in kind.typed_fields():
        if is_group(hint):
            yield from list_groups(hint, field.name)


def describe_option(
    action: argparse.Action, declared: Declared, ignored: str | None, known: Sequence[str] | None
) -> dict[str, Any]:
    """Return the description of an option; `known` lists values of one that has no fixed choices."""
    return {
        **describe_action(action),
        **({"type": "path"} if declared.path else {}),
        "path_kind": declared.path,
        "choices": known if action.choices is None else list(action.choices),
        "takes_other_values": known is not None and action.dest != RECIPE,
        **describe_range(declared.range),
        "needs_one_of": list(declared.requires or declared.needs.names),
        "excludes": sorted(declared.excludes),
        "has_no_effect": declared.ignored or ignored,
        "is_usual": declared.usual,
    }


def describe_action(action: argparse.Action) -> dict[str, Any]:
    """Return what a parser knows of an option or, if its flag is None, of a positional argument."""
    return {
        "name": action.dest,
        "flag": action.option_strings[0] if action.option_strings else None,
        "type": "flag" if action.nargs == 0 else TYPES.get(action.type or str, "text"),
        "is_list": action.nargs not in (None, 0, "?"),
        "is_required": action.required,
        "default": None if action.default is argparse.SUPPRESS else action.default,
        "choices": None if action.choices is None else list(action.choices),
        "help": (action.help or "").replace("%%", "%"),
    }


def describe_command(path: Path) -> dict[str, Any]:
    """Return the description of a tool or a caching script."""
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    parser = importlib.import_module(name.replace("/", ".")).setup_parser()
    actions = [action for action in parser._actions if action.dest not in ("help", "version")]
    return {
        "name": f"{name}.py",
        "description": parser.description,
        "options": [describe_action(action) for action in actions],
    }


def list_training_scripts() -> list[str]:
    return sorted(path.name for pattern in SCRIPTS for path in ROOT.glob(pattern))


def list_tools() -> Iterator[Path]:
    """Yield the tools; other modules in their folder have no parser."""
    for path in sorted((ROOT / "tools").glob("*.py")):
        setup = getattr(importlib.import_module(f"tools.{path.stem}"), "setup_parser", None)
        if setup is not None and all(p.default is not p.empty for p in inspect.signature(setup).parameters.values()):
            yield path


def describe_key(key: Declared) -> dict[str, Any]:
    """Return the description of a key of the dataset file."""
    return {
        "name": key.name,
        "value": key.kind.name,
        **describe_declared(key),
        "levels": list(key.levels),
        "styles": list(key.styles),
        "default_option": key.flag,
        "has_no_effect": key.ignored,
    }


def describe_declared(declared: Declared) -> dict[str, Any]:
    """Return what a declaration says of the values and the meaning of a setting."""
    return {
        "type": declared.kind.type,
        "is_list": declared.kind.is_list,
        **describe_range(declared.range),
        "default": declared.default,
        "help": declared.help,
    }


def describe_range(range: Range) -> dict[str, Any]:
    return {
        "minimum": range.at_least,
        "exclusive_minimum": range.above,
        "maximum": range.at_most,
        "exclusive_maximum": range.below,
    }


def describe_prompt_keys() -> dict[str, list[dict[str, str]]]:
    """Return the keys of --prompts_file, of an entry and of a slider."""
    return {
        entry: [{"name": name, "value": kind.name} for name, kind in keys.items()]
        for entry, keys in (("pair", PAIR_KEYS), ("slider", SLIDER_KEYS))
    }


def describe_kind(kind: AdapterKind) -> dict[str, Any]:
    """Return an adapter kind with the network arguments that it accepts."""
    groups = (*COMMON, DoraArguments, *kind.wrappers, kind.arguments)
    return {
        "network_module": kind.network_module,
        "adapter": kind.layouts[0].words,
        "default_rank": kind.default_rank,
        "arguments": [
            {
                "name": name,
                "aliases": list(argument.aliases),
                "needs": argument.needs.words or None,
                **describe_declared(argument),
            }
            for group in groups
            for name, argument in list_declared(group).items()
            if name not in kind.refuses
        ],
    }


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
