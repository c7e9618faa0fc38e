"""Where the regularisation images are kept that the base model draws itself (`prompt` and `num` of a subset)."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from library.base.errors import naming
from library.data.description.schema import DatasetConfig, RunDataConfig, SubsetConfig
from library.options.declared import Declared
from library.options.model import ModelOptions
from library.options.output.prompts import PromptSpec, parse_line
from library.options.train import TrainOptions

FOLDER = "sd-scripts-class-images"  # below HF_HOME, for runs without --cache_dir


def place_class_images(
    config: RunDataConfig, values: Mapping[str, Any], declared: Mapping[str, Declared]
) -> RunDataConfig:
    """Return the description with the folder, and the caption, of every subset whose images are drawn; `values` and
    `declared` are those of all options."""

    def place(dataset: DatasetConfig, subset: SubsetConfig) -> SubsetConfig:
        if subset.prompt is None:
            return subset
        text = parse_prompt(subset).prompt
        # Images of another base model, prompt or size are never taken for these.
        drawn_with = repr((list(describe_base(values, declared)), subset.prompt, dataset.resolution))
        digest = blake2b(drawn_with.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        name = re.sub(r"\W+", "_", text)[:40].strip("_") or "images"
        folder = find_parent(values["cache_dir"]) / f"{name}-{digest}"
        return replace(subset, image_dir=str(folder), class_tokens=subset.class_tokens or text)

    datasets = (
        replace(dataset, subsets=tuple(place(dataset, subset) for subset in dataset.subsets))
        for dataset in config.datasets
    )
    return replace(config, datasets=tuple(datasets))


def parse_prompt(subset: SubsetConfig) -> PromptSpec:
    """Return the text and settings of a subset's prompt. Raises UserError for a prompt that is none."""
    with naming("prompt"):
        return parse_line(str(subset.prompt), f"prompt {subset.prompt!r}")


def find_parent(cache_dir: str | None) -> Path:
    """Return the folder of the folders of images."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / FOLDER


def describe_base(values: Mapping[str, Any], declared: Mapping[str, Declared]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what determines the base model: each option that is set, with the size and time of its file."""
    common = TrainOptions.declarations()
    files = [name for name in declared if name not in common and declared[name].path is not None]
    for name in (*ModelOptions.declarations(), "base_weights", "base_weights_multiplier", *files):
        value = values[name]
        if value is not None and declared[name].affects_training:
            paths = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            yield name, value, [entry for path in map(str, paths) for entry in describe_files(path)]


def describe_files(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of a file, or of the files of a folder; nothing for other values."""
    top = Path(path).expanduser()
    if top.is_file():
        stat = top.stat()
        yield top.name, stat.st_size, stat.st_mtime_ns
    for folder, _, names in sorted(os.walk(top)) if top.is_dir() else ():
        for name in sorted(names):
            if name.endswith((".safetensors", ".bin", ".json")):
                yield from describe_files(os.path.join(folder, name))


def list_missing(subset: SubsetConfig) -> list[Path]:
    """Return the images of a subset that are not drawn yet; the name of each is its seed."""
    folder = Path(str(subset.image_dir))
    places = (folder / f"{seed:05}.png" for seed in range(1, (subset.num or 0) + 1))
    return [path for path in places if not path.is_file()]


def drawn_alone(config: RunDataConfig) -> tuple[RunDataConfig, list[SubsetConfig]]:
    """Return the description without the subsets whose images are not drawn yet, and these."""
    absent = [s for dataset in config.datasets for s in dataset.subsets if s.prompt is not None and list_missing(s)]
    datasets = (replace(d, subsets=tuple(s for s in d.subsets if s not in absent)) for d in config.datasets)
    return replace(config, datasets=tuple(d for d in datasets if d.subsets)), absent
