"""The files of a translation, each line with where it comes from, and the translation as people read it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.atomic_files import write_whole
from library.checkpoints.marks import seal_text
from library.checkpoints.overwriting import check_target, sealed
from library.training.config_file import format_config
from library.translation.draft import Line, Outcome
from library.translation.translating import Translation

TRANSLATE_PY = "# Written by tools/translate.py, which replaces it as long as nobody has changed it."  # first line
KIND = sealed("a file that a translation wrote, unchanged", TRANSLATE_PY)
MOST_LETTERS = 60  # of a value that is shown
OF_DATASETS = (
    "resolution", "batch_size", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
    "bucket_no_upscale", "skip_image_resolution",
)  # fmt: skip


@dataclass(frozen=True)
class TranslatedFiles:
    """The files that a translation is written to."""

    config: Path

    @property
    def dataset(self) -> Path:
        return self.config.with_name(f"{self.config.stem}-dataset.toml")

    @property
    def prompts(self) -> Path:
        return self.config.with_name(f"{self.config.stem}-prompts.txt")


def list_values(translation: Translation, files: TranslatedFiles) -> dict[str, Line]:
    """Return the options with the paths of the dataset file and the prompts."""
    options = dict(translation.options)
    if translation.datasets:
        options["dataset_config"] = Line(files.dataset.as_posix(), ("the images",))
    if translation.prompts:
        options["sample_prompts"] = Line(files.prompts.as_posix(), ("the prompts",))
    return options


def render_files(translation: Translation, source: Path, files: TranslatedFiles) -> dict[Path, str]:
    """Return the text of each file."""
    script = translation.script or "the base model's script"
    head = [f"# Options of {script}.", f"# Translated from {source.name} of {translation.title}.", ""]
    lines = [render_line(name, line) for name, line in list_values(translation, files).items()]
    notes = [f"# {line}" for line in describe_missing(translation)]
    texts = {files.config: "\n".join([*head, *lines, *(["", "# Without an equal:"] if notes else []), *notes])}
    if translation.datasets:
        texts[files.dataset] = "\n".join(line for dataset in translation.datasets for line in render_dataset(dataset))
    if translation.prompts:
        texts[files.prompts] = "\n".join(translation.prompts)
    return {path: f"{text}\n" for path, text in texts.items()}


def render_dataset(dataset: Mapping[str, Line]) -> Iterator[str]:
    """Yield the lines of a dataset with one subset; resolution stands above the subset."""
    yield "[[datasets]]"
    above = [name for name in OF_DATASETS if name in dataset]
    yield from (render_line(name, dataset[name]) for name in above)
    yield "[[datasets.subsets]]"
    yield from (render_line(name, line) for name, line in dataset.items() if name not in above)


def render_line(name: str, line: Line) -> str:
    """Return `name = value` with a comment; a value that TOML lacks is written as text."""
    origin = ", ".join(line.origins).replace("\n", " ").replace("\r", " ")
    return f"{format_config({name: line.value}).strip()}  # {origin}"


def describe_missing(translation: Translation) -> list[str]:
    """Return a line for each setting without an equal, with what happens instead; equal reasons share a line."""
    by_text = dict[str, list[Outcome]]()
    for outcome in translation.missing:
        by_text.setdefault(outcome.text, []).append(outcome)
    return [f"{', '.join(map(name_outcome, outcomes))}: {text}" for text, outcomes in by_text.items()]


def name_outcome(outcome: Outcome) -> str:
    is_token = "password" in outcome.text
    return outcome.place if is_token else f"{outcome.place} = {shorten(outcome.value)}"


def shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).replace("\n", " ")
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} …"


def describe(translation: Translation, source: Path, texts: Mapping[Path, str]) -> list[str]:
    """Return the translation as lines: its files, and what has no equal."""
    lines = [f"{source} is a configuration of {translation.title}; here it is:"]
    for path, text in texts.items():
        lines += ["", f"--- {path}", *text.rstrip().splitlines()]
    counts = {how: sum(outcome.how == how for outcome in translation.outcomes) for how in ("equal", "converted")}
    missing = len(translation.missing)
    lines += ["", f"{counts['equal']} settings are equal, {counts['converted']} converted, {missing} without an equal"]
    return [*lines, *(f"note: {remark}" for remark in translation.remarks)]


def check_files(files: TranslatedFiles, flag: str, source: Path) -> None:
    """Raise UserError if a file of the translation is the source, or is there and no translation wrote it."""
    for path in (files.config, files.dataset, files.prompts):
        check_target(flag, path, KIND, (source,))


def write_files(texts: Mapping[Path, str]) -> None:
    """Write the files of a translation, the options last."""
    for path, text in reversed(list(texts.items())):
        write_whole(path, seal_text(TRANSLATE_PY, text))
