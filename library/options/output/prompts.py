"""Preview prompts (`sample_prompts`) as a .txt, .toml or .json file has them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.base.errors import UserError, error_in, naming
from library.base.suggestions import did_you_mean
from library.options.config_file import read_json, read_text, read_toml
from library.options.declared import declare, list_declared
from library.options.kinds import TABLE, TEXT, TEXTS, Kind, choice, number, read_value, whole
from library.options.output.preview import PreviewOptions
from library.options.output.sampler_names import ALIASES, SAMPLERS
from library.options.tables import Table, read_table
from library.options.training.run import MAX_SEED

FLAG = "--sample_prompts"
NEAR = 0.5  # similarity above which a misspelt name is recognised
SEED_OF_STRIP = 1  # of several strengths without --d: images to compare start from the same noise
STRIP = re.compile(r"(\s--am\s+)([^\s,]*(?:,[^\s,]*)+)(?=\s|$)", re.IGNORECASE)
OPTION = re.compile(r"(?:^|\s+)--")

PATHS = replace(TEXTS, name="the path of an image, or a list of them")
SAMPLER = choice(*SAMPLERS, *ALIASES)
SCALE = number(0.0, 1000.0)
STRENGTH = number(-100.0, 100.0)
SEED = Kind(
    f"a whole number from 0 to {MAX_SEED}, or -1 for none",
    whole(-1, MAX_SEED).fits,
    lambda value: None if value == -1 else int(value),  # as in other programs
)


@dataclass(frozen=True)
class PromptSpec:
    """The settings of one prompt; None if not given. Field names are the keys in TOML and JSON."""

    place: str  # "--sample_prompts prompts.txt, line 3", for messages
    prompt: str
    negative_prompt: str | None = declare(TEXT, None, letters="n")
    """What the image is guided away from; has no effect without guidance."""
    width: int | None = declare(whole(1, 1 << 16), None, letters="w")
    """Width in pixels, rounded down to what the base model draws."""
    height: int | None = declare(whole(1, 1 << 16), None, letters="h")
    """Height in pixels, rounded down to what the base model draws."""
    seed: int | None = declare(SEED, None, letters="d")
    """Seed of the noise; -1 is none."""
    sample_steps: int | None = declare(whole(1, 1000), None, letters="s")
    """Number of steps."""
    scale: float | None = declare(number(-100.0, 1000.0), None, letters="l")
    """Scale of classifier-free guidance; 1 and below is none."""
    guidance_scale: float | None = declare(SCALE, None, letters="g")
    """Guidance input of a guidance-distilled model."""
    sample_sampler: str | None = declare(SAMPLER, None, letters="ss")
    """Sampler, before --sample_sampler."""
    cfg_trunc_ratio: float | None = declare(number(0.0, 1.0), None, letters="ctr")
    """Share of the steps with guidance."""
    renorm_cfg: float | None = declare(SCALE, None, letters="rcfg")
    """Limit on the norm of a guided prediction."""
    flow_shift: float | None = declare(number(1e-3, 1000.0), None, letters="fs")
    """Shift of the noise levels toward noise."""
    image_path: str | None = declare(TEXT, None, letters="i")
    """Image that an inpainting model repaints."""
    controlnet_image: str | None = declare(TEXT, None, letters="cn")
    """Has no effect: no ControlNet is loaded."""
    control_image_path: tuple[str, ...] | None = declare(PATHS, None, letters="ci")
    """Reference images, in a line one per option."""
    strength: float | None = declare(STRENGTH, None, letters="am")
    """Strength of the adapter; a line may list several, an image each."""


REFERENCES = "control_image_path"
SETTINGS = list_declared(PromptSpec)
KINDS: Mapping[str, Kind] = {"prompt": TEXT, **{name: setting.kind for name, setting in SETTINGS.items()}}
LINE_OPTIONS: Mapping[str, str] = {setting.letters: name for name, setting in SETTINGS.items()}
"""Option in a line of text, without `--` -> its name in TOML and JSON."""


def read_prompts(path: Path, flag: str = FLAG) -> list[PromptSpec]:
    """Read the prompts of a file, which the option `flag` names, in order; none for an empty file.

    Raises UserError naming the file, the line or entry, and what to do.
    """
    label, suffix = f"{flag} {path}", path.suffix.lower()
    with naming(flag, path, file=path):
        if suffix == ".txt":
            return list(specs_in_text(label, read_text(path, flag)))
        if suffix == ".toml":
            return list(specs_in_toml(label, read_toml(path, flag)))
        if suffix == ".json":
            return list(specs_in_json(label, read_json(path, flag)))
        raise UserError(f"{flag} is {path}", "use a .txt file with a prompt a line, or a .toml or .json file")


def read_preview_prompts(options: PreviewOptions) -> list[PromptSpec]:
    """Read --sample_prompts, which is set, with the seeds of --walk_seed. Raises UserError."""
    specs = read_prompts(Path(str(options.sample_prompts)))
    return walk_seeds(specs) if options.walk_seed else specs


def specs_in_text(label: str, text: str) -> Iterator[PromptSpec]:
    """Yield one prompt per line, skipping blank lines and comments (`#`)."""
    for index, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            with naming(None, place=f"line {index}"):
                yield from parse_strip(line, f"{label}, line {index}")


def specs_in_toml(label: str, tables: Table) -> Iterator[PromptSpec]:
    """Yield the prompts of a TOML file: `[prompt]` holds shared settings, each `[[prompt.subset]]` is one image."""
    if not tables:
        return
    shared, subsets = tables.get("prompt"), None
    if isinstance(shared, dict):
        subsets = shared.get("subset")
    if tables.keys() != {"prompt"} or not isinstance(subsets, list) or not isinstance(shared, dict):
        raise UserError(f"{label} must have a table [prompt], which all share, and a [[prompt.subset]] each")
    common = {key: value for key, value in shared.items() if key != "subset"}
    for index, subset in enumerate(subsets, start=1):
        place = f"[[prompt.subset]] number {index}"
        with naming(None, place=place):
            label_of_entry = f"{label}, {place}"
            yield parse_prompt_table({**common, **read_value(subset, TABLE, label_of_entry)}, label_of_entry)


def specs_in_json(label: str, entries: Any) -> Iterator[PromptSpec]:
    """Yield the prompts of a list of objects, or of strings like lines of a .txt file."""
    if entries is None:
        return
    if not isinstance(entries, list):
        raise UserError(f'{label} must be a list of prompts: [{{"prompt": "a cat"}}]')
    for index, entry in enumerate(entries, start=1):
        place = f"{label}, entry {index}"
        with naming(None, place=f"entry {index}"):
            yield parse_line(entry, place) if isinstance(entry, str) else parse_prompt_table(entry, place)


def parse_strip(line: str, place: str) -> Iterator[PromptSpec]:
    """Yield the prompt of a line; with several strengths (`--am -2,-1,0,1,2`) one per strength, all with one seed."""
    match = STRIP.search(line)
    if match is None:
        yield parse_line(line, place)
        return
    for strength in match[2].split(","):
        spec = parse_line(f"{line[: match.start(2)]}{strength}{line[match.end(2) :]}", place)
        yield replace(spec, seed=SEED_OF_STRIP if spec.seed is None else spec.seed)


def walk_seeds(specs: Sequence[PromptSpec]) -> list[PromptSpec]:
    """Return the prompts of a file, the seed of each raised by its number from 0; the strengths of a line share one."""
    numbers = {place: number for number, place in enumerate(dict.fromkeys(spec.place for spec in specs))}
    return [
        spec if spec.seed is None else replace(spec, seed=(spec.seed + numbers[spec.place]) % (MAX_SEED + 1))
        for spec in specs
    ]


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
            raise error_in(key)(f"{place}: --{letters} is given twice", "keep one")
        extends = KINDS[key] in (TEXT, PATHS)
        value, _, trailing = (text.strip(), "", "") if extends else text.strip().partition(" ")
        table[key] = [*table.get(key, []), value] if key == REFERENCES else value if extends else parse_number(value)
        words.append(trailing.strip())
    return parse_prompt_table({"prompt": " ".join(filter(None, words)), **table}, place)


def parse_number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def parse_prompt_table(table: Any, place: str) -> PromptSpec:
    values = read_table(read_value(table, TABLE, place), KINDS, lambda key: f"{place}: {describe_setting(key)}")
    if "prompt" not in values:
        raise UserError(f"{place} has no text", 'give one with "prompt"')
    return PromptSpec(place=place, **values)


def describe_setting(key: str) -> str:
    """Format a setting with its name in TOML and in a line: `width (--w)`."""
    return f"{key} (--{SETTINGS[key].letters})" if key in SETTINGS else key
