"""The concepts to train, read from a TOML file (`prompts_file`) in one of two forms.

`[[prompts]]` are pairs as they are trained. `[[targets]]` are sliders, each of which is expanded to two or four pairs
for every neutral prompt and size. Keys above them are defaults for all entries. The formats are those of LECO and
ai-toolkit, as sd-scripts reads them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from library.errors import UserError
from library.options.config_file import read_toml
from library.options.encodings import decode_utf8
from library.options.ranges import is_finite_number
from library.suggestions import did_you_mean

logger = logging.getLogger(__name__)

Warn = Callable[..., None]
"""A function that takes a message and its arguments, like a logger's method."""

FLAG = "--prompts_file"
ERASE, ENHANCE, PRESERVE = "erase", "enhance", "preserve"
DEFAULT_SIDE = 512
LARGEST_SIDE, LARGEST_BATCH, LARGEST_NUMBER = 1 << 14, 1 << 10, 1000.0

SHARED_KEYS = ("guidance_scale", "dynamic_resolution", "batch_size", "dynamic_crops", "multiplier", "weight")
PAIR_KEYS = ("target", "positive", "unconditional", "neutral", "action", "resolution", *SHARED_KEYS)
NEUTRAL_LISTS = ("neutrals", "neutral_prompt_file", "prompt_file")
SLIDER_KEYS = (
    "target_class", "positive", "negative", "neutral", *NEUTRAL_LISTS, "resolution", "resolutions", *SHARED_KEYS,
)  # fmt: skip
TEXT_KEYS = (
    "target", "target_class", "positive", "negative", "unconditional", "neutral", "action", "neutral_prompt_file",
    "prompt_file",
)  # fmt: skip
FLAG_KEYS = ("dynamic_resolution", "dynamic_crops")


@dataclass(frozen=True)
class PromptPair:
    """A trained change of a prompt with all settings: an entry of the file, or one direction of a slider."""

    place: str  # "prompts.toml, [[prompts]] number 2", for messages
    target: str
    positive: str
    unconditional: str
    neutral: str
    action: str  # ERASE, ENHANCE or PRESERVE
    guidance_scale: float
    height: int
    width: int
    dynamic_resolution: bool
    batch_size: int
    dynamic_crops: bool
    multiplier: float
    weight: float

    @property
    def has_drawn_size(self) -> bool:
        """True if the size is drawn for each batch."""
        return self.dynamic_resolution and self.height == self.width

    @property
    def push(self) -> float:
        """The factor of (positive - unconditional) that is added to the neutral prediction. Negative values erase."""
        return {ERASE: -1.0, ENHANCE: 1.0, PRESERVE: 0.0}[self.action] * self.guidance_scale

    @property
    def texts(self) -> tuple[str, ...]:
        """The different prompts of the pair."""
        return tuple(dict.fromkeys((self.target, self.positive, self.unconditional, self.neutral)))


def read_prompt_pairs(path: Path, warn: Warn = logger.warning) -> list[PromptPair]:
    """Read the pairs of a file, with sliders expanded. `warn` reports keys without the expected effect.

    Raises UserError naming the file, the entry, the key and the fix.
    """
    if path.suffix.lower() in (".yaml", ".yml", ".json", ".txt"):
        raise UserError(f"{FLAG} is {path}; it must be a TOML file; docs/train_leco.md shows how to convert others")
    tables = read_toml(path, FLAG)
    if not tables:
        raise UserError(f'{FLAG} {path} is empty; it needs [[prompts]] with target = "...", or [[targets]]')
    shared, entries = split_entries(tables, path)
    check_shared(shared, entries, path)
    pairs = [pair for entry in entries for pair in build_pairs(entry, shared, path.parent, warn)]
    for pair in pairs:
        check_teaches(pair)
    if all(pair.action == PRESERVE for pair in pairs):
        raise UserError(f"{FLAG} {path}: every entry has action {PRESERVE}, so nothing is changed; add one to {ERASE}")
    return pairs


class Entry(NamedTuple):
    """An entry of the file, as written."""

    place: str
    values: Mapping[str, Any]
    is_pair: bool  # a pair as it is trained, not a slider

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are allowed in the entry."""
        return PAIR_KEYS if self.is_pair else SLIDER_KEYS


def split_entries(tables: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Return (the defaults above the entries, the entries)."""
    kinds = [name for name in ("prompts", "targets", "slider") if name in tables]
    if len(kinds) > 1:
        raise UserError(f"{FLAG} {path} has {' and '.join(kinds)}, but only one of them may be used; use two files")
    shared = dict(tables)
    if kinds == ["slider"]:
        inner = shared.pop("slider")
        if shared or not isinstance(inner, dict):
            raise UserError(f"{FLAG} {path}: all keys belong in [slider]: move {', '.join(shared) or 'it'} there")
        shared = dict(inner)
    kind = "prompts" if kinds == ["prompts"] else "targets"
    if kind not in shared:
        if "target" not in shared and "target_class" not in shared:
            raise UserError(f'{FLAG} {path} names no prompts; it needs [[prompts]] with target = "...", or [[targets]]')
        return {}, [Entry(str(path), shared, is_pair="target_class" not in shared)]
    entry_tables = shared.pop(kind)
    if (
        not isinstance(entry_tables, list)
        or not entry_tables
        or not all(isinstance(entry, dict) for entry in entry_tables)
    ):
        raise UserError(f"{FLAG} {path}: {kind} is not a list of tables; begin each entry with [[{kind}]]")
    entries = []
    for number, values in enumerate(entry_tables, start=1):
        is_pair = "target_class" not in values if kind == "prompts" else "target" in values
        entries.append(Entry(f"{path}, [[{kind}]] number {number}", values, is_pair))
    return shared, entries


def check_shared(shared: Mapping[str, Any], entries: Sequence[Entry], path: Path) -> None:
    """Raise UserError for a default that no entry accepts."""
    known = [key for entry in entries for key in entry.keys]
    for key in shared:
        if key not in known:
            raise unknown_key_error(key, known, str(path))


def unknown_key_error(key: str, known: Sequence[str], place: str) -> UserError:
    """Return the error for an unknown key."""
    names = ", ".join(dict.fromkeys(known))
    return UserError(f"{FLAG} {place}: unknown key {key!r}{did_you_mean(key, known)}; known: {names}")


def build_pairs(entry: Entry, shared: Mapping[str, Any], folder: Path, warn: Warn) -> list[PromptPair]:
    """Return the pairs of an entry. `shared` holds the defaults; paths of files are relative to `folder`."""
    place, entry_values = entry.place, entry.values
    if "target" in entry_values and "target_class" in entry_values:
        raise UserError(
            f"{FLAG} {place} has target and target_class; the first defines a pair, the second a slider: keep one"
        )
    for key in entry_values:
        if key not in entry.keys:
            raise unknown_key_error(key, entry.keys, place)
    inherited = {key: value for key, value in shared.items() if key in entry.keys}
    for group in ((*NEUTRAL_LISTS, "neutral"), ("resolution", "resolutions")):
        if entry_values.keys() & set(group):  # an entry overrides a group of keys as a whole
            inherited = {key: value for key, value in inherited.items() if key not in group}
    values = {key: check_value(key, value, place) for key, value in {**inherited, **entry_values}.items()}
    if entry.is_pair and "target" not in values:
        raise UserError(f'{FLAG} {place} has no target; add target = "..."')
    pairs = [build_pair(place, values)] if entry.is_pair else list(slider_pairs(place, values, folder, warn))
    if fixed := [pair for pair in pairs if pair.dynamic_resolution and not pair.has_drawn_size]:
        warn(
            "%s %s: dynamic_resolution has no effect on %d x %d (height x width): only square sizes vary",
            FLAG, place, fixed[0].height, fixed[0].width,
        )  # fmt: skip
    return pairs


def check_value(key: str, value: Any, place: str) -> Any:
    """Check the type and range of a value, and return it. Sizes and lists are checked where they are used."""
    prefix = f"{FLAG} {place}: {key} is {value!r}"
    if key in TEXT_KEYS:
        if not isinstance(value, str):
            raise UserError(f"{prefix}; use text in quotes")
        if key == "action" and value not in (ERASE, ENHANCE, PRESERVE):
            raise UserError(f'{prefix}; use "{ERASE}", which is the default, "{ENHANCE}" or "{PRESERVE}"')
        return value
    if key in FLAG_KEYS:
        if not isinstance(value, bool):
            raise UserError(f"{prefix}; use true or false")
        return value
    if key in (*NEUTRAL_LISTS, "resolution", "resolutions"):
        return value
    if not is_finite_number(value):
        raise UserError(f"{prefix}; use a number")
    if key == "batch_size":
        return check_integer(value, 1, LARGEST_BATCH, prefix)
    if key == "weight" and value <= 0:
        raise UserError(f"{prefix}; the loss is multiplied by it, so it must be above 0")
    if key == "multiplier" and value == 0:
        raise UserError(f"{prefix}, with which the adapter learns nothing; the default is 1.0")
    if abs(value) > LARGEST_NUMBER:
        raise UserError(f"{prefix}; use a number of at most {LARGEST_NUMBER:g}")
    return float(value)


def check_integer(value: Any, least: int, most: int, prefix: str) -> int:
    """Return `value` as an integer. Raises UserError if it is none or out of range."""
    if not is_finite_number(value) or value != int(value) or not least <= value <= most:
        raise UserError(f"{prefix}; use an integer from {least} to {most}")
    return int(value)


def build_pair(place: str, values: Mapping[str, Any], size: Any = None) -> PromptPair:
    """Build a pair from these values, of which only `target` is required."""
    height, width = parse_size(values.get("resolution", DEFAULT_SIDE), place) if size is None else size
    unconditional, action = values.get("unconditional", ""), values.get("action", ERASE)
    if action == PRESERVE:
        for key in ("positive", "neutral"):
            if key in values:
                raise UserError(
                    f"{FLAG} {place}: {key} has no effect with action {PRESERVE}, which keeps what the base model "
                    "predicts for target; remove it"
                )
        # With a push of 0 the training target is the base model's prediction for `neutral`, here that for `target`.
        values = {**values, "neutral": values["target"]}
    return PromptPair(
        place=place,
        target=values["target"],
        positive=values.get("positive", values["target"]),
        unconditional=unconditional,
        neutral=values.get("neutral", unconditional),
        action=action,
        guidance_scale=values.get("guidance_scale", 1.0),
        height=height,
        width=width,
        dynamic_resolution=values.get("dynamic_resolution", False),
        batch_size=values.get("batch_size", 1),
        dynamic_crops=values.get("dynamic_crops", False),
        multiplier=values.get("multiplier", 1.0),
        weight=values.get("weight", 1.0),
    )


def parse_size(value: Any, place: str) -> tuple[int, int]:
    """Parse a single side or [height, width] to (height, width)."""
    prefix = f"{FLAG} {place}: resolution is {value!r}"
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise UserError(f"{prefix}; use one side, such as 512, or [height, width]")
    height, width = (check_integer(side, 1, LARGEST_SIDE, prefix) for side in sides)
    return height, width


def parse_sizes(values: Mapping[str, Any], place: str, warn: Warn) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of a slider: one, or each of a list."""
    if "resolution" in values and "resolutions" in values:
        raise UserError(f"{FLAG} {place} has both resolution and resolutions; keep one")
    value = values.get("resolutions", values.get("resolution", DEFAULT_SIDE))
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [parse_size(size, place) for size in value]
    height, width = parse_size(value, place)
    if "resolutions" in values and isinstance(value, list):
        warn(
            "%s %s: resolutions = [%d, %d] is one size, height %d, width %d; for two squares use [[%d, %d], [%d, %d]]",
            FLAG, place, height, width, height, width, height, height, width, width,
        )  # fmt: skip
    return [(height, width)]


def slider_pairs(place: str, values: Mapping[str, Any], folder: Path, warn: Warn) -> Iterator[PromptPair]:
    """Yield both directions of a slider for each neutral prompt and size: toward positive and away from negative at
    `multiplier`, and the reverse at -`multiplier`."""
    positive, negative = (values.get(key, "") for key in ("positive", "negative"))
    has_positive, has_negative = bool(positive.strip()), bool(negative.strip())
    if not has_positive and not has_negative:
        raise UserError(f"{FLAG} {place} has neither positive nor negative; add one end of the slider, or both")
    if positive == negative:
        raise UserError(f"{FLAG} {place}: positive and negative are both {positive!r}; use two ends")
    multiplier = values.get("multiplier", 1.0)
    if has_positive and has_negative:
        directions = [
            (negative, positive, ERASE, multiplier),
            (positive, negative, ENHANCE, multiplier),
            (positive, negative, ERASE, -multiplier),
            (negative, positive, ENHANCE, -multiplier),
        ]
    elif has_negative:
        directions = [(negative, "", ERASE, multiplier), (negative, "", ENHANCE, -multiplier)]
    else:
        directions = [(positive, "", ENHANCE, multiplier), (positive, "", ERASE, -multiplier)]
    sizes = parse_sizes(values, place, warn)
    for neutral in read_neutral_prompts(values, place, folder):
        for size in sizes:
            for end, other_end, action, strength in directions:
                overrides = {"target": values.get("target_class", ""), "positive": end, "unconditional": other_end}
                overrides |= {"neutral": neutral, "action": action, "multiplier": strength}
                yield build_pair(place, {**values, **overrides}, size)


def read_neutral_prompts(values: Mapping[str, Any], place: str, folder: Path) -> list[str]:
    """Return the neutral prompts of a slider: `neutrals` and the lines of its prompt files, or else `neutral`."""
    lists = [key for key in NEUTRAL_LISTS if key in values]
    if lists and "neutral" in values:
        raise UserError(f"{FLAG} {place} has both neutral and {lists[0]}; keep one")
    if not lists:
        return [values.get("neutral", "")]
    prompts: list[str] = []
    if "neutrals" in values:
        listed = values["neutrals"]
        if not isinstance(listed, list) or not all(isinstance(prompt, str) for prompt in listed):
            raise UserError(f'{FLAG} {place}: neutrals is {listed!r}; use a list of texts, such as ["", "a photo"]')
        prompts += listed
    for key in ("neutral_prompt_file", "prompt_file"):
        if key in values:
            prompts += read_lines(folder / values[key], f"{FLAG} {place}: {key}")
    if not prompts:
        raise UserError(f'{FLAG} {place}: {" and ".join(lists)} contain no prompt; use [""] for the empty one')
    return prompts


def read_lines(path: Path, prefix: str) -> list[str]:
    """Return the non-empty lines of a text file."""
    if not path.is_file():
        raise UserError(f"{prefix} is {path}, but there is no such file; the path is relative to the TOML file")
    lines = decode_utf8(path.read_bytes(), f"{prefix} {path}").splitlines()
    return [line.strip() for line in lines if line.strip()]


def check_teaches(pair: PromptPair) -> None:
    """Raise UserError for a pair whose training target equals the base model's own prediction."""
    if pair.action == PRESERVE:
        return
    if pair.neutral == pair.target and (pair.positive == pair.unconditional or pair.guidance_scale == 0):
        same = f"positive and unconditional are both {pair.positive!r}"
        reason = "guidance_scale is 0" if pair.guidance_scale == 0 else same
        raise UserError(
            f"{FLAG} {pair.place} teaches nothing: {reason}, so {pair.target!r} would stay as it is; use another "
            "positive, unconditional or neutral prompt"
        )
