"""How a value of another trainer becomes one here, by the names of `CONVERSIONS` in library/options/other_programs."""

import re
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import PurePosixPath
from typing import Any

from library.options.other_programs import Equivalent
from library.translation.configuration import Setting
from library.translation.draft import Draft, Line, is_off, merge

MOST_MEGAPIXELS = 32.0  # a larger resolution is a number of pixels
BETAS = (0.9, 0.999)
UNITS: Mapping[str, str] = {"EPOCH": "epochs", "STEP": "steps", "MINUTE": "minutes"}


class Unanswered(Exception):
    """A value that has no equal here; the text says what happens instead."""


def negate(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    """Return the opposite. Of several settings for one option, one that is on decides."""
    name = draft.find_option(entry)
    line = draft.options.get(name or "")
    off = is_off(value)
    return off and (line is None or line.is_weak or bool(line.value)) if name == "network_train_unet_only" else off


def pair(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    """Return both values of an optimizer's argument; the names end in 1 and 2."""
    line = draft.optimizer.get(entry.optimizer)
    values = list(line.value if line is not None else BETAS)
    values[int(setting.name[-1]) - 1] = value
    return values


def pairs(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    """Return name=value words of a table, of a list of them, or of a text with commas."""
    if isinstance(value, dict):
        return [f"{name}={item}" for name, item in value.items()]
    return list(map(str, value)) if isinstance(value, list) else re.split(r"[,\s]+", str(value).strip())


def collect(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    """Return a list of all values so far; a list of sides stays, and becomes a dataset each."""
    if entry.key == "resolution":
        return [to_side(side) for side in (value if isinstance(value, list) else str(value).split(","))]
    table = draft.options if entry.option else draft.subsets.get(setting.subset or 0, draft.general)
    line = table.get(draft.find_option(entry) or entry.key)
    earlier = [] if line is None or line.is_weak else list(line.value)
    return [*earlier, *(value if isinstance(value, list) else [value])]


def to_side(text: Any) -> Any:
    """Return a side in pixels, or [width, height] of a text such as 512x768."""
    sides = [int(side) for side in re.findall(r"\d+", str(text))]
    return sides[0] if len(sides) == 1 else sides


def patterns(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    parts = value if isinstance(value, list) else str(value).split(",")
    return str([f".*{re.escape(str(part).strip())}.*" for part in parts if str(part).strip()])


def dot(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    return f".{str(value).lstrip('.')}"


def latest(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    if value != "latest":
        return value
    draft.put(draft.options, "autoresume", Line(True, (setting.place,)))
    return None


def prompt_lines(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    draft.prompts.extend(value if isinstance(value, list) else [value])
    return None


def folder_and_name(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    path = PurePosixPath(str(value).replace("\\", "/"))
    draft.put(draft.options, "output_name", Line(path.stem, (setting.place,)))
    return str(path.parent)


def saves_to_steps(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    draft.kept[entry.options[0]] = Line(int(value), (setting.place,))
    return None


def unit(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    """Set the option of a number's unit; the name of the unit's own setting ends in _unit."""
    if setting.name.endswith("_unit") or is_off(value):
        return None  # read with the number
    name = str(draft.values.get(f"{setting.name}_unit"))
    if is_off(name):
        return None
    option = entry.options[0].replace("steps", UNITS.get(name, ""))
    if name not in UNITS or option not in draft.known:
        raise Unanswered(f"--{entry.options[0]} counts steps, not {name.lower()}s; set it yourself")
    draft.put(draft.options, option, merge(Line(value, (setting.place,)), value, f"{setting.name}_unit"))
    return None


def thousandths(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    return round(float(value) * 1000)


def plus_one(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    return value + 1


def share_of_blocks(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    """Let --fit choose, which knows how many blocks there are and how many have to wait."""
    if "fit" not in draft.known:
        raise Unanswered("use --blocks_to_swap")
    draft.put(draft.options, "fit", Line("auto", (setting.place,)))
    return None


def share_of_rate(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    return float(value) / float(draft.values["learning_rate"])


def megapixels(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    side = value if value > MOST_MEGAPIXELS else sqrt(value * 1e6)
    return round(side) if value > MOST_MEGAPIXELS else max(64, round(side / 64) * 64)


def hundredths(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    return float(value) / 100


def prompt_text(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    draft.prompts.extend(line for line in str(value).splitlines() if line.strip())
    return None


def sides(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    return ",".join(re.findall(r"\d+", str(value)))


def size(value: Any, entry: Equivalent, setting: Setting, draft: Draft) -> Any:
    """Return the width of WIDTHxHEIGHT, and set the height."""
    width, height, *_ = 2 * [int(side) for side in re.findall(r"\d+", str(value))]
    draft.letters["h"] = height
    return width


Conversion = Callable[[Any, Equivalent, Setting, Draft], Any]
"""Returns the value, or None if it has added what the setting means."""
BY_NAME: Mapping[str, Conversion] = {
    "negate": negate,
    "pair": pair,
    "pairs": pairs,
    "list": collect,
    "patterns": patterns,
    "dot": dot,
    "latest": latest,
    "prompt_lines": prompt_lines,
    "folder_and_name": folder_and_name,
    "saves_to_steps": saves_to_steps,
    "unit": unit,
    "thousandths": thousandths,
    "plus_one": plus_one,
    "share_of_blocks": share_of_blocks,
    "share_of_rate": share_of_rate,
    "megapixels": megapixels,
    "hundredths": hundredths,
    "prompt_text": prompt_text,
    "sides": sides,
    "size": size,
}
