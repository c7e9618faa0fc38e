"""Where the regularisation images are kept that the base model draws itself (`prompt` and `num` of a subset)."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from library.data.description.schema import DatasetConfig, RunDataConfig, SubsetConfig
from library.options.train import TrainOptions

FOLDER = "sd-scripts-class-images"  # below HF_HOME, for runs without --cache_dir


def place_class_images(config: RunDataConfig, options: TrainOptions) -> RunDataConfig:
    """Return the description with the folder, and the caption, of every subset whose images are drawn."""

    def place(dataset: DatasetConfig, subset: SubsetConfig) -> SubsetConfig:
        if subset.prompt is None:
            return subset
        text = re.split(r"\s--\w", subset.prompt)[0].strip()
        folder = find_folder(options, subset.prompt, text, dataset.resolution)
        return replace(subset, image_dir=str(folder), class_tokens=subset.class_tokens or text)

    datasets = (
        replace(dataset, subsets=tuple(place(dataset, subset) for subset in dataset.subsets))
        for dataset in config.datasets
    )
    return replace(config, datasets=tuple(datasets))


def find_folder(options: TrainOptions, prompt: str, text: str, resolution: tuple[int, int]) -> Path:
    """Return the folder for the images of a prompt. Its name holds a digest of what they are drawn with, so images of
    another base model, prompt or size are never taken for them."""
    digest = blake2b(
        repr((list(base_values(options)), prompt, resolution)).encode("utf-8", "surrogatepass"), digest_size=8
    )
    name = re.sub(r"\W+", "_", text)[:40].strip("_") or "images"
    if options.caching.cache_dir:
        parent = Path(options.caching.cache_dir).expanduser()
    else:
        from huggingface_hub.constants import HF_HOME

        parent = Path(HF_HOME) / FOLDER
    return parent / f"{name}-{digest.hexdigest()}"


def base_values(options: TrainOptions) -> Iterator[tuple[str, Any, Any]]:
    """Yield what determines the base model: each option that is set, with the size and time of its file."""
    values, declared, common = options.flat(), type(options).declarations(), TrainOptions.declarations()
    files = [name for name in declared if name not in common and declared[name].path is not None]
    for name in (*options.model.flat(), *files):
        value = values[name]
        if value is not None and declared[name].affects_training:
            yield name, value, list(describe_files(value)) if isinstance(value, str) else None
    if options.network.base_weights:
        yield (
            "base_weights",
            options.network.base_weights_multiplier,
            [entry for path in options.network.base_weights for entry in describe_files(path)],
        )


def describe_files(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of a file, or of the files of a folder; nothing for other values."""
    top = Path(path).expanduser()
    if top.is_file():
        stat = top.stat()
        yield top.name, stat.st_size, stat.st_mtime_ns
    for folder, _, names in os.walk(top) if top.is_dir() else ():
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
