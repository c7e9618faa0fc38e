"""Preview prompts (`sample_prompts`) from a .txt, .toml or .json file.

`PromptSpec` holds a prompt's own settings; `resolve` fills in the base model's defaults.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.json_text import InvalidJson, parse_json
from library.options.config_file import read_text, read_toml
from library.options.output.sampler_names import ALIASES, SAMPLERS
from library.options.ranges import is_finite_number
from library.options.training.run import MAX_SEED
from library.protocols import Architecture, PromptDefaults
from library.suggestions import did_you_mean
from library.types import Prompt

logger = logging.getLogger(__name__)

FLAG = "--sample_prompts"
NEAR = 0.5  # similarity above which a misspelt name is recognised
SMALLEST_SIDE = 64
MAX_STEPS = 1000
SEED_OF_STRIP = 1  # of several strengths without --d: images to compare start from the same noise
STRIP = re.compile(r"(\s--am\s+)([^\s,]*(?:,[^\s,]*)+)(?=\s|$)", re.IGNORECASE)
OPTION = re.compile(r"(?:^|\s+)--")

LINE_OPTIONS: Mapping[str, str] = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "g": "guidance_scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
    "i": "image_path",
    "ci": "control_image_path",
    "am": "strength",
}
"""Option in a line of text, without `--` -> its name in TOML and JSON."""


@dataclass(frozen=True)
class PromptSpec:
    """The settings of one prompt; None if not given. Field names are the keys in TOML and JSON."""

    place: str  # "--sample_prompts prompts.txt, line 3", for messages
    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int | None = None
    scale: float | None = None
    guidance_scale: float | None = None
    sample_sampler: str | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None
    flow_shift: float | None = None
    image_path: str | None = None
    controlnet_image: str | None = None
    control_image_path: tuple[str, ...] | None = None  # reference images; `--ci` may be repeated
    strength: float | None = None


KEYS = [f.name for f in fields(PromptSpec) if f.name != "place"]
REFERENCES = "control_image_path"
# In a line of text they extend to the next option.
WORDS = ("negative_prompt", "image_path", "controlnet_image", REFERENCES)
RANGES: Mapping[str, tuple[float, float]] = {
    "width": (1, 1 << 16),
    "height": (1, 1 << 16),
    "sample_steps": (1, MAX_STEPS),
    "seed": (0, MAX_SEED),
    "scale": (-100.0, 1000.0),
    "guidance_scale": (0.0, 1000.0),
    "cfg_trunc_ratio": (0.0, 1.0),
    "renorm_cfg": (0.0, 1000.0),
    "flow_shift": (1e-3, 1000.0),
    "strength": (-100.0, 100.0),
}
"""Setting -> the smallest and the largest value that means something, as int where only whole numbers do."""


def read_prompts(path: Path, flag: str = FLAG) -> list[PromptSpec]:
    """Read the prompts of a file, which the option `flag` names, in order; none for an empty file.

    Raises UserError naming the file, the line or entry, and what to do.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".toml", ".json"):
        raise UserError(f"{flag} is {path}; use a .txt file with a prompt a line, or a .toml or .json file")
    if kind == ".toml":
        return list(specs_in_toml(path, flag))
    text, label = read_text(path, flag), f"{flag} {path}"
    return list(specs_in_text(label, text) if kind == ".txt" else specs_in_json(label, text))


def specs_in_text(label: str, text: str) -> Iterator[PromptSpec]:
    """Yield one prompt per line, skipping blank lines and comments (`#`)."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield from parse_strip(line, f"{label}, line {number}")


def specs_in_toml(path: Path, flag: str) -> Iterator[PromptSpec]:
    """Yield the prompts of a TOML file: `[prompt]` holds shared settings, each `[[prompt.subset]]` is one image."""
    tables, label = read_toml(path, flag), f"{flag} {path}"
    if not tables:
        return
    shared, subsets = tables.get("prompt"), None
    if isinstance(shared, dict):
        subsets = shared.get("subset")
    if tables.keys() != {"prompt"} or not isinstance(subsets, list) or not isinstance(shared, dict):
        raise UserError(f"{label} must have a table [prompt], which all share, and a [[prompt.subset]] each")
    common = {key: value for key, value in shared.items() if key != "subset"}
    for number, subset in enumerate(subsets, start=1):
        place = f"{label}, [[prompt.subset]] number {number}"
        if not isinstance(subset, dict):
            raise UserError(f"{place} is {subset!r}; it must be a table")
        yield parse_prompt_table({**common, **subset}, place)


def specs_in_json(label: str, text: str) -> Iterator[PromptSpec]:
    """Yield the prompts of a list of objects, or of strings like lines of a .txt file."""
    try:
        entries = parse_json(text) if text.strip() else []
    except InvalidJson as error:
        raise UserError(f"{label} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f'{label} must be a list of prompts: [{{"prompt": "a cat"}}]')
    for number, entry in enumerate(entries, start=1):
        place = f"{label}, entry {number}"
        if isinstance(entry, str):
            yield parse_line(entry, place)
        elif isinstance(entry, dict):
            yield parse_prompt_table(entry, place)
        else:
            raise UserError(f"{place} is {entry!r}; it must be a string or an object")


def parse_strip(line: str, place: str) -> Iterator[PromptSpec]:
    """Yield the prompt of a line; with several strengths (`--am -2,-1,0,1,2`) one per strength, all with one seed."""
    match = STRIP.search(line)
    if match is None:
        yield parse_line(line, place)
        return
    for strength in match[2].split(","):
        spec = parse_line(f"{line[: match.start(2)]}{strength}{line[match.end(2) :]}", place)
        yield replace(spec, seed=SEED_OF_STRIP if spec.seed is None else spec.seed)


def parse_line(line: str, place: str) -> PromptSpec:
    """Parse a line such as `a cat --w 768 --n blurry`: the text before the first option is the prompt.

    Words after an option's value also belong to the prompt, unless the option takes a text, which extends to the next
    option.
    """
    # sd-scripts looks for options in the text as well, where "n dogs" becomes a negative prompt.
    prompt, *options = OPTION.split(line.strip())
    words, table = [prompt.strip()], dict[str, Any]()
    for option in options:
        letters, _, text = option.strip().partition(" ")
        key = LINE_OPTIONS.get(letters.lower())
        if key is None:
            raise UserError(
                f"{place}: --{letters} is no option of a prompt{did_you_mean(letters, LINE_OPTIONS, NEAR)}. "
                f"There are {', '.join(f'--{name}' for name in LINE_OPTIONS)}, each with a space before its value; "
                'a prompt that itself has " --" in it can stand in a .toml or .json file'
            )
        if key in table and key != REFERENCES:
            raise UserError(f"{place}: --{letters} is given twice; keep one")
        value, _, trailing = (text.strip(), "", "") if key in WORDS else text.strip().partition(" ")
        if key == REFERENCES:
            table[key] = [*table.get(key, []), value]
        else:
            table[key] = number_in(value, key) if key in RANGES else value
        words.append(trailing.strip())
    return parse_prompt_table({"prompt": " ".join(filter(None, words)), **table}, place)


def number_in(text: str, key: str) -> int | float | str:
    """Return the number in a line of text; what is none stays text, which `check_setting` refuses."""
    with suppress(ValueError):
        return type(RANGES[key][0])(text)
    return text


def parse_prompt_table(table: Mapping[str, Any], place: str) -> PromptSpec:
    """Check the settings of one prompt and return them."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in KEYS:
            raise UserError(f"{place}: there is no {key!r}{did_you_mean(key, KEYS, NEAR)}. There are {', '.join(KEYS)}")
        if value is not None:
            values[key] = check_setting(key, value, place)
    if "prompt" not in values:
        raise UserError(f'{place} has no text; give one with "prompt"')
    return PromptSpec(place=place, **values)


def check_setting(key: str, value: Any, place: str) -> Any:
    """Convert a value to its type. A seed of -1 means no seed, as in other programs."""
    if key == "sample_sampler":
        check_sampler(value, f"{place}: {describe_setting(key)}")
        return value
    if key == REFERENCES:
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UserError(f"{place}: {key} is {value!r}; give the path of an image, or a list of them")
        return tuple(paths)
    if key not in RANGES:
        if not isinstance(value, str):
            raise UserError(f"{place}: {key} is {value!r}; give text in quotes")
        return value
    if key == "seed" and value == -1:
        return None
    (low, high), kind = RANGES[key], type(RANGES[key][0])
    # A whole float such as 512.0 passes, because some front ends write every number so.
    if not is_finite_number(value) or value != kind(value):
        number = "a whole number" if kind is int else "a number"
        raise UserError(f"{place}: {describe_setting(key)} is {value!r}; give {number}")
    if not low <= value <= high:
        raise UserError(
            f"{place}: {describe_setting(key)} is {value}; use {low:g} to {high if kind is int else f'{high:g}'}"
        )
    return kind(value)


def check_sampler(name: Any, setting: str) -> None:
    """Raise UserError for an unknown sampler; `setting` names it in the message."""
    known = [*SAMPLERS, *ALIASES]
    if name not in known:
        raise UserError(f"{setting} is {name!r}{did_you_mean(str(name), known, NEAR)}; use one of {', '.join(known)}")


def describe_setting(key: str) -> str:
    """Format a setting with its name in TOML and in a line: `width (--w)`."""
    return f"{key} (--{next(letters for letters, name in LINE_OPTIONS.items() if name == key)})"


def resolve_all(specs: Iterable[PromptSpec], arch: Architecture) -> list[Prompt]:
    """Resolve all prompts for a base model."""
    defaults, max_references = arch.preview.defaults, arch.codec.spec.max_references
    return [resolve(spec, defaults, arch.inpaints, max_references) for spec in specs]


def resolve(spec: PromptSpec, defaults: PromptDefaults, inpaints: bool = False, max_references: int = 0) -> Prompt:
    """Fill in a prompt's missing settings; warn of settings without effect.

    Raises UserError for an inpainting model without an image, for missing image files, and for more than
    `max_references` reference images.
    """
    if spec.controlnet_image is not None:
        logger.warning(
            "%s: %s is ignored, because no ControlNet is loaded in adapter training",
            spec.place, describe_setting("controlnet_image"),
        )  # fmt: skip
    scale = defaults.scale if spec.scale is None else spec.scale
    if scale <= 1 and spec.negative_prompt:
        logger.warning(
            "%s: %s has no effect at %s %g, which is no guidance; give a scale above 1, or remove it",
            spec.place, describe_setting("negative_prompt"), describe_setting("scale"), scale,
        )  # fmt: skip
    return Prompt(
        text=spec.prompt,
        negative=spec.negative_prompt or "",
        width=round_side(spec.width or defaults.width, defaults.size_step, spec.place),
        height=round_side(spec.height or defaults.height, defaults.size_step, spec.place),
        seed=spec.seed,
        num_steps=spec.sample_steps or defaults.num_steps,
        scale=scale,
        sampler=take_setting(spec, "sample_sampler", defaults.sampler),
        guidance_scale=take_setting(spec, "guidance_scale", defaults.guidance_scale),
        cfg_trunc_ratio=take_setting(spec, "cfg_trunc_ratio", defaults.cfg_trunc_ratio),
        renorm_cfg=take_setting(spec, "renorm_cfg", defaults.renorm_cfg),
        flow_shift=take_setting(spec, "flow_shift", defaults.flow_shift),
        image_path=read_inpainted_image(spec) if inpaints else take_setting(spec, "image_path", None),
        reference_paths=read_references(spec, max_references),
        strength=1.0 if spec.strength is None else spec.strength,
    )


def refuse_strengths(specs: Sequence[PromptSpec], flag: str) -> None:
    """Raise UserError for a prompt with a strength if a tool's `flag` sets the strengths of all."""
    for spec in specs:
        if spec.strength is not None:
            raise UserError(
                f"{spec.place}: remove {describe_setting('strength')}; {flag} sets the strengths of all prompts"
            )


def read_inpainted_image(spec: PromptSpec) -> Path:
    """Return the prompt's image for an inpainting model."""
    if spec.image_path is None:
        raise UserError(
            f"{spec.place} names no image to paint in; give one with {describe_setting('image_path')}, whose "
            "transparent part is painted anew, or a random part where nothing is transparent"
        )
    return require_file(Path(spec.image_path), "image_path", spec.place)


def require_file(path: Path, key: str, place: str) -> Path:
    """Return the path. Raises UserError if there is no file."""
    if not path.is_file():
        raise UserError(f"{place}: {describe_setting(key)} is {path}, but there is no such file")
    return path


def read_references(spec: PromptSpec, max_references: int) -> tuple[Path, ...]:
    """Return a prompt's reference images; none, with a warning, for a model without them."""
    paths = spec.control_image_path or ()
    if paths and not max_references:
        take_setting(spec, REFERENCES, None)
        return ()
    if len(paths) > max_references:
        raise UserError(
            f"{spec.place}: {describe_setting(REFERENCES)} names {len(paths)} images, but this base model takes at "
            f"most {max_references}"
        )
    return tuple(require_file(Path(path), REFERENCES, spec.place) for path in paths)


def round_side(wanted: int, step: int, place: str) -> int:
    """Return an image side that the base model supports: a multiple of `step`, at least 64."""
    # sd-scripts rounds down too, with the same smallest side.
    rounded = max(SMALLEST_SIDE, wanted - wanted % step)
    if rounded != wanted:
        logger.info("%s: a side of %d is drawn as %d, a multiple of %d", place, wanted, rounded, step)
    return rounded


def take_setting(spec: PromptSpec, key: str, default: Any) -> Any:
    """Return a prompt's setting, or the default with a warning if the base model does not support it."""
    value = getattr(spec, key)
    if default is None and value is not None:
        logger.warning("%s: %s has no effect on this base model", spec.place, describe_setting(key))
        return None
    return default if value is None else value
