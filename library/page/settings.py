"""All settings of a training as train.py reads them from its command line, and the form of them."""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from library.base.errors import UserError, about

IN_FORM = ("prediction", "like")  # those of train.py's own options that have no field elsewhere on the page
OF_PAGE = ("kind", "steps", "minutes", "models")
SHOWN = ("name", "type", "is_list", "choices", "takes_other_values", "default", "help")
NEGATIVE = re.compile(r"-\d*\.?\d+")  # argparse takes other words that begin with "-" for options


def read_settings(inputs: Mapping[str, Any]) -> tuple[argparse.Namespace, Any, dict[str, Any]]:
    """Return what train.py makes of a draft's settings: its options, the base, and the options of the base's script.

    Raises UserError for what it refuses, and for an option that the page sets itself.
    """
    import train
    from library.train_photos.command_line import read_command_line

    own = train.setup_parser()
    for name in inputs["options"].keys() & ({action.dest for action in own._actions} - {*IN_FORM}):
        raise about(f"--{name}")("is set by the page itself", "leave it out here")
    words = [f"--{name}={inputs[name]}" for name in OF_PAGE if inputs[name] not in (None, "")]
    words += [word for name, value in inputs["options"].items() for word in write_words(f"--{name}", value)]
    return read_command_line(train.add_options, own, [inputs["root"], f"--base={inputs['base']}", *words], raises=True)


def write_words(flag: str, value: Any) -> Iterator[str]:
    """Yield the words of a command line that give an option its value. Raises UserError for a value among several that
    would be read as another option."""
    if not isinstance(value, list):
        yield flag if value is True else f"{flag}={value}"
        return
    yield flag
    for text in value:
        if text.startswith("-") and not NEGATIVE.fullmatch(text):
            raise about(flag)(f"has the value {text}, which begins like an option", "leave it out")
        yield text


def list_settings(inputs: Mapping[str, Any], say: Callable[..., None]) -> dict[str, Any]:
    """Return the options of train.py for a base model with the recipe's values, and what is wrong with those that are
    set. Raises UserError for a base that cannot be trained."""
    import train
    from library.train_photos.session import find_recipe
    from tools.capabilities import describe_action, describe_options

    args, base, _ = read_settings({**inputs, "options": {}})
    own = {action.dest: action for action in train.setup_parser()._actions}
    options = [
        {**asdict(describe_action(own[name])), "group": "train.py", "is_usual": True, "facts": {}} for name in IN_FORM
    ]
    declared = base.spec.options.declarations()
    for option in describe_options(base.spec.script):
        if not is_set_elsewhere(option.name, own):
            facts = list_facts(declared[option.name], base.spec.ignores)
            options.append({**{key: getattr(option, key) for key in (*SHOWN, "group", "is_usual")}, "facts": facts})
    return {"options": options, "recipe": dict(find_recipe(args, base).values), **check_settings(inputs)}


def is_set_elsewhere(name: str, own: Mapping[str, argparse.Action]) -> bool:
    """Return True for an option of the script that train.py sets itself, or has as its own."""
    from library.train_photos.command_line import REFUSED

    return name in REFUSED or name in own


def list_facts(declared: Any, ignores: Mapping[str, str]) -> dict[str, str]:
    """Return what a declaration says of an option besides its help, by the name of the page's text."""
    from library.options.no_effect import describe_needs

    facts = {
        "takes": declared.kind.name if declared.kind.type in ("int", "float", "steps") else "",
        "requires": describe_needs(declared.requires) if declared.requires else "",
        "needs": describe_needs(declared.needs.names) if declared.needs.names else "",
        "excludes": describe_needs([*declared.excludes]) if declared.excludes else "",
        "unless": f"--{declared.unless}" if declared.unless else "",
        "ignored": declared.ignored or ignores.get(declared.name, ""),
        "refused": declared.unsupported or "",
        "aliases": ", ".join(declared.aliases),
    }
    return {name: text for name, text in facts.items() if text}


def check_settings(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first error of the options that are set, and which of them have no effect; the plan finds more."""
    from library.options.no_effect import find_unused
    from library.train_photos.session import find_recipe
    from library.training.command_line.option_checks import check_values
    from library.training.command_line.recipes import PATHS

    try:
        args, base, given = read_settings(inputs)
        recipe = {name: value for name, value in find_recipe(args, base).values.items() if name not in PATHS}
        options = base.spec.options.from_args(
            argparse.Namespace(**{**base.spec.options.defaults(), **recipe, **base.values, **given})
        )
        check_values(options)
        unused = {line.split()[0].removeprefix("--"): line for line in find_unused(options, base.spec.ignores)}
        return {"error": None, "unused": {name: line for name, line in unused.items() if name in given}}
    except UserError as error:
        return {"error": describe_error(error), "unused": {}}


def describe_error(error: UserError) -> dict[str, Any]:
    return {"message": str(error), "setting": error.setting, "path": error.path, "cause": error.cause}
