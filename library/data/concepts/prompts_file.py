"""The concepts to train, read from a TOML file (`prompts_file`) in one of two forms.

`[[prompts]]` are pairs as they are trained. `[[targets]]` are sliders, each of which is expanded to two or four pairs
for every neutral prompt and size. Keys above them are defaults for all entries. The formats are those of LECO and
ai-toolkit, as sd-scripts reads them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from library.base.errors import UserError, naming
from library.options.config_file import read_toml
from library.options.encodings import decode_utf8
from library.options.kinds import BOOL, TEXT, Kind, choice, is_texts, number, size, whole
from library.options.tables import find_problem, is_table_list, read_table

logger = logging.getLogger(__name__)

Warn = Callable[..., None]
"""A function that takes a message and its arguments, like a logger's method."""

FLAG = "--prompts_file"
ERASE, ENHANCE, PRESERVE = "erase", "enhance", "preserve"
DEFAULT_SIDE = 512

SIZE = size(1, 1 << 14, "[height, width]")


def is_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, list) and SIZE.fits(one) for one in value)


SIZES = Kind(f"{SIZE.name}, or a list of sizes", lambda v: SIZE.fits(v) or is_sizes(v))
NUMBER = number(None, 1000)
SHARED_KEYS: Mapping[str, Kind] = {
    "positive": TEXT,
    "neutral": TEXT,
    "guidance_scale": NUMBER,
    "dynamic_resolution": BOOL,
    "batch_size": whole(1, 1 << 10),
    "dynamic_crops": BOOL,
    "multiplier": replace(
        NUMBER, name=f"{NUMBER.name} other than 0, which teaches nothing", fits=lambda v: NUMBER.fits(v) and v != 0
    ),
    # The loss is multiplied by it.
    "weight": replace(NUMBER, name=f"{NUMBER.name} and above 0", fits=lambda v: NUMBER.fits(v) and v > 0),
}
PAIR_KEYS: Mapping[str, Kind] = {
    "target": TEXT,
    "unconditional": TEXT,
    "action": choice(ERASE, ENHANCE, PRESERVE),
    "resolution": SIZE,
    **SHARED_KEYS,
}
NEUTRAL_LISTS: Mapping[str, Kind] = {
    "neutrals": Kind('a list of texts, such as ["", "a photo"]', is_texts),
    "neutral_prompt_file": TEXT,
    "prompt_file": TEXT,
}
SLIDER_KEYS: Mapping[str, Kind] = {
    "target_class": TEXT,
    "negative": TEXT,
    "resolution": SIZES,
    "resolutions": SIZES,
    **NEUTRAL_LISTS,
    **SHARED_KEYS,
}


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
    with naming(FLAG, path, file=path):
        if path.suffix.lower() in (".yaml", ".yml", ".json", ".txt"):
            raise UserError(f"{FLAG} is {path}; it must be a TOML file; docs/train_leco.md shows how to convert others")
        tables = read_toml(path, FLAG)
        if not tables:
            raise UserError(f'{FLAG} {path} is empty; it needs [[prompts]] with target = "...", or [[targets]]')
        shared, entries = split_entries(tables, path)
        check_shared(shared, entries, path)
        pairs = []
        for entry in entries:
            with naming(None, place=entry.place.removeprefix(f"{path}, ")):
                pairs += build_pairs(entry, shared, path.parent, warn)
        for pair in pairs:
            check_teaches(pair)
        if all(pair.action == PRESERVE for pair in pairs):
            raise UserError(
                f"{FLAG} {path}: every entry has action {PRESERVE}, so nothing is changed", f"add one to {ERASE}"
            )
        return pairs


class Entry(NamedTuple):
    """An entry of the file, as written."""

    place: str
    values: Mapping[str, Any]
    is_pair: bool  # a pair as it is trained, not a slider

    @property
    def keys(self) -> Mapping[str, Kind]:
        return PAIR_KEYS if self.is_pair else SLIDER_KEYS


def split_entries(tables: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Return (the defaults above the entries, the entries)."""
    kinds = [name for name in ("prompts", "targets", "slider") if name in tables]
    if len(kinds) > 1:
        raise UserError(f"{FLAG} {path} has {' and '.join(kinds)}, but only one of them may be used", "use two files")
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
    if not entry_tables or not is_table_list(entry_tables):
        raise UserError(f"{FLAG} {path}: {kind} is not a list of tables", f"begin each entry with [[{kind}]]")
    entries = []
    for index, values in enumerate(entry_tables, start=1):
        is_pair = "target_class" not in values if kind == "prompts" else "target" in values
        entries.append(Entry(f"{path}, [[{kind}]] number {index}", values, is_pair))
    return shared, entries


def check_shared(shared: Mapping[str, Any], entries: Sequence[Entry], path: Path) -> None:
    """Raise UserError for a default that no entry accepts."""
    known = {key: kind for entry in entries for key, kind in entry.keys.items()}
    for key, value in shared.items():
        if key not in known:
            raise UserError(str(find_problem(key, value, known, f"{FLAG} {path}: {key}")))


def build_pairs(entry: Entry, shared: Mapping[str, Any], folder: Path, warn: Warn) -> list[PromptPair]:
    """Return the pairs of an entry. `shared` holds the defaults; paths of files are relative to `folder`."""
    place, entry_values = entry.place, entry.values
    if "target" in entry_values and "target_class" in entry_values:
        raise UserError(
            f"{FLAG} {place} has target and target_class; the first defines a pair, the second a slider: keep one"
        )
    inherited = {key: value for key, value in shared.items() if key in entry.keys}
    for group in ((*NEUTRAL_LISTS, "neutral"), ("resolution", "resolutions")):
        if entry_values.keys() & set(group):  # an entry overrides a group of keys as a whole
            inherited = {key: value for key, value in inherited.items() if key not in group}
    values = read_table({**inherited, **entry_values}, entry.keys, lambda key: f"{FLAG} {place}: {key}")
    if entry.is_pair and "target" not in values:
        raise UserError(f"{FLAG} {place} has no target", 'add target = "..."')
    pairs = [build_pair(place, values)] if entry.is_pair else list(slider_pairs(place, values, folder, warn))
    if fixed := [pair for pair in pairs if pair.dynamic_resolution and not pair.has_drawn_size]:
        warn(
            "%s %s: dynamic_resolution has no effect on %d x %d (height x width): only square sizes vary",
            FLAG, place, fixed[0].height, fixed[0].width,
        )  # fmt: skip
    return pairs


def build_pair(place: str, values: Mapping[str, Any]) -> PromptPair:
    """Build a pair from these values, of which only `target` is required."""
    height, width = values.get("resolution", (DEFAULT_SIDE, DEFAULT_SIDE))
    unconditional, action = values.get("unconditional", ""), values.get("action", ERASE)
    if action == PRESERVE:
        for key in ("positive", "neutral"):
            if key in values:
                raise UserError(
                    f"{FLAG} {place}: {key} has no effect with action {PRESERVE}, which keeps what the base model "
                    "predicts for target",
                    "remove it",
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


def read_sizes(values: Mapping[str, Any], place: str, warn: Warn) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of a slider: one, or each of a list."""
    if "resolution" in values and "resolutions" in values:
        raise UserError(f"{FLAG} {place} has both resolution and resolutions", "keep one")
    value = values.get("resolutions", values.get("resolution", DEFAULT_SIDE))
    if is_sizes(value):
        return [SIZE.convert(one) for one in value]
    height, width = SIZE.convert(value)
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
        raise UserError(f"{FLAG} {place} has neither positive nor negative", "add one end of the slider, or both")
    if positive == negative:
        raise UserError(f"{FLAG} {place}: positive and negative are both {positive!r}", "use two ends")
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
    sizes = read_sizes(values, place, warn)
    for neutral in read_neutral_prompts(values, place, folder):
        for one_size in sizes:
            for end, other_end, action, strength in directions:
                ends = {"target": values.get("target_class", ""), "positive": end, "unconditional": other_end}
                drawn = {"neutral": neutral, "action": action, "multiplier": strength, "resolution": one_size}
                yield build_pair(place, {**values, **ends, **drawn})


def read_neutral_prompts(values: Mapping[str, Any], place: str, folder: Path) -> list[str]:
    """Return the neutral prompts of a slider: `neutrals` and the lines of its prompt files, or else `neutral`."""
    lists = [key for key in NEUTRAL_LISTS if key in values]
    if lists and "neutral" in values:
        raise UserError(f"{FLAG} {place} has both neutral and {lists[0]}", "keep one")
    if not lists:
        return [values.get("neutral", "")]
    prompts: list[str] = list(values.get("neutrals", ()))
    for key in ("neutral_prompt_file", "prompt_file"):
        if key in values:
            prompts += read_lines(folder / values[key], f"{FLAG} {place}: {key}")
    if not prompts:
        raise UserError(f"{FLAG} {place}: {' and '.join(lists)} contain no prompt", 'use [""] for the empty one')
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
            f"{FLAG} {pair.place} teaches nothing: {reason}, so {pair.target!r} would stay as it is",
            "use another positive, unconditional or neutral prompt",
        )
