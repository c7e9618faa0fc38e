"""Print the capabilities of this suite as JSON: base models, scripts, options, network modules, weight formats.

Meant for front ends that build their forms from the output; docs/capabilities.schema.json describes it.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.scripts import ROOT
from library.architectures.specs import list_specs
from library.errors import UserError
from library.options.base import Facts, Options, int_or_float
from library.options.leco import LecoOptions
from library.options.machine.base_formats import BASE_FORMATS
from library.suggestions import nearest_name
from library.version import NAME, VERSION
from networks.core.arguments.common import COMMON
from networks.core.arguments.network_arguments import list_declared
from networks.core.changes.dora import DoraArguments
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.layouts import list_kinds
from tools.command import command, make_parser

SCRIPTS = ("*train_network.py", "*train_leco.py")
TYPES = {str: "text", Path: "path", int: "int", float: "float", int_or_float: "steps"}
EXAMPLES = """\
  python3 tools/capabilities.py --json > capabilities.json
  python3 tools/capabilities.py --script train_network.py --json"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON; unset: a short list to read")
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
            }
            for spec in list_specs()
        ],
        "scripts": [{"name": name, "options": list(describe_options(name))} for name in scripts],
        "network_modules": [describe_kind(kind) for kind in list_kinds() if kind.network_module],
        "base_formats": list(BASE_FORMATS),
    }


def describe_options(script: str) -> Iterator[dict[str, Any]]:
    """Yield a description of every option of a script, combining its parser and its declaration."""
    parser = importlib.import_module(script.removesuffix(".py")).setup_parser()
    kinds: list[type[Options]] = [LecoOptions]
    kinds += [spec.options for spec in list_specs() if script in (spec.script, spec.prompts_script)]
    facts = {name: option_facts for kind in kinds for name, option_facts in kind.facts().items()}
    # argparse has no public way to list the groups of a parser.
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest != "help":
                yield describe_option(action, group.title, facts[action.dest])


def describe_option(action: argparse.Action, group: str, facts: Facts) -> dict[str, Any]:
    type_name = "flag" if action.nargs == 0 else TYPES[action.type or str]
    return {
        "name": action.dest,
        "flag": action.option_strings[0],
        "group": group,
        "type": type_name,
        "is_list": action.nargs not in (None, 0, "?"),
        "default": action.default,
        "choices": None if action.choices is None else list(action.choices),
        "takes_other_values": facts.takes_other_values,
        "minimum": 0 if facts.is_share else facts.at_least,
        "exclusive_minimum": facts.above,
        "maximum": 1 if facts.is_share else facts.at_most,
        "needs_one_of": list(facts.requires or facts.needs),
        "excludes": sorted(facts.excludes),
        "has_no_effect": facts.ignored,
        "is_usual": facts.usual,
        "in_sd_scripts": not facts.own,
        "help": (action.help or "").replace("%%", "%"),
    }


def describe_kind(kind: AdapterKind) -> dict[str, Any]:
    """Return an adapter kind with the network arguments that it accepts."""
    groups = (*COMMON, DoraArguments, *kind.wrappers, kind.arguments)
    defaults = {f.name: f.default for group in groups for f in fields(group)}
    return {
        "network_module": kind.network_module,
        "adapter": kind.layouts[0].words,
        "default_rank": kind.default_rank,
        "arguments": [
            {
                "name": name,
                "aliases": list(argument.aliases),
                "default": defaults[name],
                "needs": argument.requires.words if argument.requires else None,
                "help": argument.help,
            }
            for group in groups
            for name, argument in list_declared(group).items()
            if name not in kind.refuses
        ],
    }


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
    scripts = sorted(path.name for pattern in SCRIPTS for path in ROOT.glob(pattern))
    if args.script and args.script not in scripts:
        suggestion = nearest_name(args.script, scripts)
        raise UserError(f"--script {args.script} is not a training script; use {suggestion or ', '.join(scripts)}")
    capabilities = list_capabilities([args.script] if args.script else scripts)
    if args.json:
        print(json.dumps(capabilities, ensure_ascii=True))
    else:
        print("\n".join(show(capabilities)))


main = command(setup_parser, print_capabilities)

if __name__ == "__main__":
    sys.exit(main())
