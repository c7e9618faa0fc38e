"""Reads the description of the data: each value from the first that sets it: subset, dataset, general, option, default.

The keys are declared in `schema`.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.errors import UserError, error_in, naming
from library.base.suggestions import did_you_mean
from library.data.description.captions import CaptionRules
from library.data.description.class_images import place_class_images
from library.data.description.flat_datasets import with_subsets
from library.data.description.folder_options import list_subsets, warn_of_ignored
from library.data.description.keys import Level, Style, is_allowed_at
from library.data.description.overridden import find_overridden, given_keys, typed_default_keys
from library.data.description.preservation import KEYS, PRESERVATION, check_preservation, read_preservation
from library.data.description.schema import (
    ALL_KEYS,
    CACHE_INFO,
    CAPTION_KEYS,
    DATASET_KEYS,
    FILE_SOURCES,
    KINDS,
    NETWORK_MULTIPLIER,
    REQUIRED,
    SUBSET_KEYS,
    DatasetConfig,
    RunDataConfig,
    SubsetConfig,
)
from library.data.description.source_keys import SOURCES, keys_used_by
from library.options.base import Options
from library.options.config_file import read_json, read_toml, refuse_unusable
from library.options.dataset import FOLDER_FLAGS, DatasetOptions
from library.options.declared import Declared
from library.options.kinds import TABLE, number, read_value
from library.options.other_programs import explain_name
from library.options.tables import Table, find_problem, is_table_list
from library.options.train import TrainOptions

logger = logging.getLogger(__name__)

HEADINGS: Mapping[Level, str] = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}


def load_dataset_config(options: TrainOptions) -> RunDataConfig:
    """Read the description of the data from `dataset_config`, else `in_json`, else the image folders.

    Raises UserError naming file and place: unreadable TOML or JSON, unknown or misplaced keys, wrong types, missing
    keys, and unsupported settings.
    """
    data = options.dataset
    if data.dataset_class:
        raise error_in("--dataset_class")(
            f"--dataset_class {data.dataset_class} makes batches during training, but this requires the images "
            "themselves",
            "describe them with --dataset_config",
        )
    fallbacks = option_values(options.flat())
    config = read_folders(data, fallbacks) if data.dataset_config is None else read_file(data, fallbacks)
    warn_of_idle_options(data, config)
    return place_class_images(config, options.flat(), type(options).declarations())


def read_folders(data: DatasetOptions, fallbacks: Table) -> RunDataConfig:
    """Read the image folders of the command line; `fallbacks` are the values of options."""
    style, subsets = list_subsets(data)
    dataset = build_dataset({"subsets": subsets}, {}, fallbacks, style, "command line")
    return RunDataConfig((dataset,), is_from_file=False)


def read_file(data: DatasetOptions, fallbacks: Table) -> RunDataConfig:
    """Read the dataset file; `fallbacks` are the values of options."""
    warn_of_ignored(data, FOLDER_FLAGS, "--dataset_config describes the data")
    path, (content, problems) = str(data.dataset_config), read_content(data)
    if problems:
        first, texts = problems[0], [problem.text for problem in problems]
        with naming("--dataset_config", path, place=first.place, file=path):
            raise error_in(first.key)(f"{path}: " + "\n  ".join(["invalid dataset description", *texts]))
    general, tables = content.get("general", {}), with_styles(content, data)
    for line in find_overridden(given_keys(fallbacks), tables, general, fallbacks, path):
        logger.warning("%s", line)
    datasets = []
    for i, (dataset, style) in enumerate(tables):
        place = f"data['datasets'][{i}]"
        with naming("--dataset_config", path, place=place, file=path):
            datasets.append(build_dataset(dataset, general, fallbacks, style, f"{path}: {place}"))
    warn_of_unused(general, {dataset.style for dataset in datasets}, path)
    return RunDataConfig(tuple(datasets), is_from_file=True)


def read_content(data: DatasetOptions) -> tuple[Table, list["Problem"]]:
    """Return the content of the dataset file, with subsets in every dataset, and its mistakes."""
    path = str(data.dataset_config)
    content = with_subsets(read_description(path), path)
    return content, find_problems(content, data.masked_loss)


def warn_of_overridden_defaults(data: DatasetOptions, options: Options, typed: Collection[str]) -> None:
    """Warn of options that were typed with their default, and that the dataset file overrides with another value."""
    fallbacks = option_values(options.flat())
    keys = typed_default_keys(fallbacks, typed)
    if not keys or data.dataset_config is None or data.dataset_class:
        return
    content, problems = read_content(data)
    if problems:
        return  # the file is refused when it is loaded
    tables, path = with_styles(content, data), str(data.dataset_config)
    for line in find_overridden(keys, tables, content.get("general", {}), fallbacks, path):
        logger.warning("%s", line)


def with_styles(content: Table, data: DatasetOptions) -> list[tuple[Table, Style]]:
    """Return the data sets of a checked description, each with its style."""
    return [(dataset, resolve_style(dataset, data.masked_loss)) for dataset in content.get("datasets", [])]


def warn_of_idle_options(data: DatasetOptions, config: RunDataConfig) -> None:
    """Warn about options for masks or for regularisation images that no subset can use."""
    subsets = [subset for dataset in config.datasets for subset in dataset.subsets]
    have_files = [bool(subset.conditioning_data_dir) for subset in subsets]
    if data.masked_loss and not any(have_files) and not any(subset.alpha_mask for subset in subsets):
        logger.warning("--masked_loss has no effect: no subset has masks; set conditioning_data_dir or alpha_mask")
    if data.alpha_mask and subsets and all(have_files):
        logger.warning("--alpha_mask has no effect: the masks of conditioning_data_dir are used")
    if data.prior_loss_weight != type(data).prior_loss_weight and not any(subset.is_reg for subset in subsets):
        logger.warning("--prior_loss_weight has no effect: no subset has regularisation images")


# Reading


def read_description(path: str) -> dict[str, Any]:
    """Read a .toml or .json file.

    Raises UserError if it is missing, or naming the file, line and column of a mistake.
    """
    label, extension = f"--dataset_config {path}", os.path.splitext(path)[1].lower()
    if extension not in (".toml", ".json"):
        raise error_in("--dataset_config", path=path)(f"{label}: the file must end in .toml or .json")
    if extension == ".toml":
        return read_toml(Path(path), "--dataset_config")
    content: dict[str, Any] = read_value(read_json(Path(path), "--dataset_config"), TABLE, label)
    refuse_unusable(content, label)
    return content


# Checking


@dataclass(frozen=True)
class Problem:
    """A mistake in a description: a sentence, the table that it is in, and the key that it is about."""

    text: str
    place: str
    key: str | None


def find_problems(content: Table, masked_loss: bool) -> list[Problem]:
    """Return all mistakes in a description."""
    known = ("general", "datasets", *ALL_KEYS)
    problems = [
        Problem(f"data['{name}'] is not a key{did_you_mean(name, known)}; use general and datasets", "data", name)
        for name in content.keys() - {"general", "datasets"}
    ]
    general, datasets = content.get("general", {}), content.get("datasets", [])
    if isinstance(general, dict):
        problems += table_problems(general, "data['general']", "general", None)
    else:
        problems.append(Problem("data['general'] must be a table, [general]", "data", "general"))
    if not is_table_list(datasets):
        text = "data['datasets'] must be an array of tables, [[datasets]]"
        return [*problems, Problem(text, "data", "datasets")]
    for i, dataset in enumerate(datasets):
        problems += dataset_problems(dataset, f"data['datasets'][{i}]", masked_loss)
    return problems


def dataset_problems(dataset: Table, place: str, masked_loss: bool) -> Iterator[Problem]:
    """Yield the mistakes in a [[datasets]] table and its subsets."""
    if not is_table_list(dataset.get("subsets")):
        yield Problem(f"{place}['subsets'] must be an array of tables, [[datasets.subsets]]", place, "subsets")
        return
    try:
        style = resolve_style(dataset, masked_loss)
    except UserError as error:
        yield Problem(f"{place}: {error}", place, error.setting)
        return
    yield from table_problems({k: v for k, v in dataset.items() if k != "subsets"}, place, "dataset", style)
    for j, subset in enumerate(dataset["subsets"]):
        subset_place = f"{place}['subsets'][{j}]"
        yield from table_problems(subset, subset_place, "subset", style)
        if style == "dreambooth":
            yield from source_problems(subset, subset_place)
        for name in REQUIRED[style]:
            if name not in subset:
                text = f"{subset_place}['{name}'] is missing, a {style} subset needs it"
                yield Problem(text, subset_place, name)


def table_problems(table: Table, place: str, level: Level, style: Style | None) -> Iterator[Problem]:
    """Yield each unknown, misplaced or mistyped key of a table."""
    for name, value in table.items():
        setting, key = f"{place}['{name}']", ALL_KEYS.get(name)
        if key is not None and not is_allowed_at(key, level, style):
            headings = " or ".join(HEADINGS[level] for level in HEADINGS if level in key.levels)
            belongs = f"is only for subsets of style {' or '.join(key.styles)}"
            belongs = belongs if level in key.levels else f"belongs in {headings}"
            yield Problem(f"{setting} is not allowed here; it {belongs}", place, name)
        elif problem := find_problem(name, value, KINDS, setting, explain_key):
            yield Problem(problem, place, name)


def explain_key(name: str) -> str:
    """Return what to use for a key of another program's data set, or ""."""
    return explain_name(name, in_data=True)


def source_problems(subset: Table, place: str) -> list[Problem]:
    """Return the mistakes in the image source of a subset: it must have exactly one, with keys that the source uses."""
    given_sources = [name for name in SOURCES if name in subset]
    if "prompt" in subset:  # the base model draws the images
        return [
            Problem(f"{place} has prompt, which makes the images, and {name}; use two subsets", place, name)
            for name in given_sources
        ]
    if not given_sources:
        text = f"{place}['image_dir'] is missing: set a folder, or tar files as shards, or Parquet files as parquet"
        return [Problem(text, place, "image_dir")]
    if len(given_sources) > 1:
        text = f"{place} has {' and '.join(given_sources)}; each is a separate source; use two subsets"
        return [Problem(text, place, given_sources[1])]
    return [
        Problem(
            f"{place}['{name}'] has no effect with {given_sources[0]}; it is for {' and '.join(sources)}", place, name
        )
        for name in subset
        if (sources := [source for source in SOURCES if name in keys_used_by(source)])
        and given_sources[0] not in sources
    ]


def resolve_style(dataset: Table, masked_loss: bool) -> Style:
    """Return the style of a dataset's subsets. Raises UserError if styles are mixed."""
    subsets: Sequence[Table] = dataset["subsets"]
    # As in sd-scripts, masks decide before metadata files.
    if masked_loss and subsets and all("conditioning_data_dir" in subset for subset in subsets):
        return "masked"
    if any("conditioning_data_dir" in subset for subset in subsets):
        if masked_loss:
            raise UserError("only some subsets have conditioning_data_dir", "use masks for all subsets or none")
        raise UserError("conditioning_data_dir requires --masked_loss")
    has_metadata = ["metadata_file" in subset for subset in subsets]
    if any(has_metadata) and not all(has_metadata):
        raise UserError("only some subsets have metadata_file", "use separate datasets")
    return "metadata" if any(has_metadata) else "dreambooth"


def warn_of_unused(general: Table, styles: set[Style], path: str) -> None:
    """Warn about keys of [general] that no dataset of the file can use."""
    for name in general:
        if styles and styles.isdisjoint(ALL_KEYS[name].styles):
            logger.warning(
                "%s: %s in [general] has no effect: it is for subsets of style %s, and all are of style %s",
                *(path, name, " or ".join(ALL_KEYS[name].styles), " or ".join(sorted(styles))),
            )


# Building

BUCKET_SIZES = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")


def option_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of options that are defaults of keys, checked like values of the file. None means not given."""
    values = {key.name: options[key.flag] for key in ALL_KEYS.values() if key.flag}
    # sd-scripts has the option under both spellings, and the misspelt one wins.
    values["caption_extension"] = options["caption_extention"] or options["caption_extension"]
    for name in ("resolution", "skip_image_resolution"):
        if isinstance(values[name], str):
            sides = parse_numbers(f"--{name}", values[name], int, (1, 2), "512 or 768,512")
            values[name] = sides if len(sides) == 2 else sides[0]
    if isinstance(face_range := values["face_crop_aug_range"], str):
        values["face_crop_aug_range"] = parse_numbers("--face_crop_aug_range", face_range, float, (2,), "1.0,3.0")
    for name, value in values.items():
        if value is not None:
            read_value(value, KINDS[name], f"--{ALL_KEYS[name].flag}")
    return values


def parse_numbers(flag: str, text: str, kind: type, counts: tuple[int, ...], example: str) -> list[Any]:
    """Parse text such as `512,768` to numbers. Raises UserError with the flag and an example."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise UserError(f"{flag} is {text!r}, but must look like {example}")
    return numbers


def resolve_value(key: Declared, tables: Sequence[Table]) -> Any:
    """Return the first value that is set, converted. `tables` are ordered by precedence."""
    for table in tables:
        value = table.get(key.name)
        # false, 0 and "" are values too: in the file they override the command line, as in sd-scripts.
        if value is not None:
            return key.kind.convert(value)
    return key.default


def warn_if_given(key: Declared, value: Any, place: str) -> None:
    """Warn of a key that never has an effect."""
    if value != key.default:
        logger.warning("%s['%s'] has no effect: %s", place, key.name, key.ignored)


def build_dataset(dataset: Table, general: Table, fallbacks: Table, style: Style, place: str) -> DatasetConfig:
    tables = (dataset, general, fallbacks)
    values = {key.name: resolve_value(key, tables) for key in DATASET_KEYS}
    if values["resolution"] is None:
        raise error_in("resolution", cause="missing")(
            f"{place}['resolution'] is missing", "set it there, in [general], or with --resolution"
        )
    # 0 is the step of a description in musubi-tuner's form, which gets limits of its own.
    if not values["enable_bucket"] and values["bucket_reso_steps"]:
        idle = [name for name in BUCKET_SIZES if values[name] != ALL_KEYS[name].default]
        if idle:
            verb = "have" if len(idle) > 1 else "has"
            logger.warning("%s: %s %s no effect without enable_bucket", place, " and ".join(idle), verb)
    warn_if_given(NETWORK_MULTIPLIER, resolve_value(NETWORK_MULTIPLIER, tables), place)
    subsets = []
    for j, subset in enumerate(dataset["subsets"]):
        subset_config = build_subset(subset, tables, style, f"{place}['subsets'][{j}]")
        # As in sd-scripts, 0 repeats switch a subset off.
        if subset_config.num_repeats < 1:
            logger.warning("%s is skipped: num_repeats is %d", subset_config.source, subset_config.num_repeats)
            continue
        subsets.append(subset_config)
    interpolation = resolve_value(ALL_KEYS["resize_interpolation"], tables)
    return DatasetConfig(style=style, resize_interpolation=interpolation, subsets=tuple(subsets), **values)


def build_subset(subset: Table, outer: Sequence[Table], style: Style, place: str) -> SubsetConfig:
    """Build one subset. Keys that its style does not have keep their defaults."""

    def resolve(keys: Sequence[Declared]) -> dict[str, Any]:
        return {key.name: resolve_value(key, (subset, *outer)) if style in key.styles else key.default for key in keys}

    warn_if_given(CACHE_INFO, resolve((CACHE_INFO,))["cache_info"], place)
    values = resolve(SUBSET_KEYS)
    table = place.rpartition(": ")[2]
    with naming(None, place=table):
        check_conflicts(values, place)
    with naming("custom_attributes", place=table):
        check_attributes(values["custom_attributes"], place)
    files = {name: patterns for name, patterns in resolve(FILE_SOURCES).items() if patterns}
    source, patterns = next(iter(files.items()), ("metadata_file" if style == "metadata" else "image_dir", ()))
    preservation = read_preservation(values["custom_attributes"])
    if preservation is not None and preservation.outside_mask:
        require_masks(values, place)
    rules = CaptionRules(**resolve(CAPTION_KEYS), fixed=None if preservation is None else preservation.caption)
    return SubsetConfig(style=style, captions=rules, source_key=source, patterns=patterns, **values)


def require_masks(values: Table, place: str) -> None:
    """Raise UserError for a subset that preserves what masks leave out, and has none."""
    if not values["alpha_mask"] and not values["conditioning_data_dir"]:
        raise error_in("custom_attributes", others=["alpha_mask", "conditioning_data_dir"], cause="needs")(
            f"{place}: outside_mask of {PRESERVATION} needs masks",
            "set alpha_mask = true, or conditioning_data_dir and --masked_loss",
        )


def check_attributes(attributes: Table, place: str) -> None:
    """Raise UserError for custom_attributes with impossible values, and warn about those that have no effect."""
    place = f"{place}['custom_attributes']"
    sampling = read_value(attributes.get("timestep_sampling", {}), TABLE, f"{place}: timestep_sampling")
    read_value(sampling.get("offset", 0.0), number(None, 1e3), f"{place}: timestep_sampling.offset")
    preservation = check_preservation(attributes, place)
    for table, names, prefix in (
        (attributes, ("timestep_sampling", PRESERVATION), ""),
        (sampling, ("offset",), "timestep_sampling."),
        (preservation, tuple(KEYS), f"{PRESERVATION}."),
    ):
        for name in table.keys() - set(names):
            logger.warning("%s: %s%s has no effect%s", place, prefix, name, did_you_mean(name, names))


def check_conflicts(values: Table, place: str) -> None:
    """Raise UserError for keys of a subset that exclude each other."""
    if values["is_forgetting_probe"] and values["is_reg"]:
        reason = "is_forgetting_probe keeps images out of training, and is_reg trains them"
        raise conflict(place, "is_forgetting_probe", "is_reg", reason)
    if (values["prompt"], values["num"]) != (None, None) and not (
        values["prompt"] and values["num"] and values["is_reg"]
    ):
        raise error_in("prompt", others=["num", "is_reg"], cause="needs")(
            f"{place}: regularisation images that the base model draws need prompt, num and is_reg = true",
            "set all three, or remove prompt and num",
        )
    if values["conditioning_data_dir"] and values["random_crop"]:
        reason = "random_crop does not work with conditioning_data_dir: masks are cropped at the centre"
        raise conflict(place, "random_crop", "conditioning_data_dir", reason, None)
    if not values["opposite_dir"]:
        return
    for name in ("control_dirs", "control_resolution", "control_no_resize", "is_reg"):
        if values[name]:
            reason = "whose images are trained as pairs with those of the subset at equal size"
            raise conflict(place, name, "opposite_dir", f"{name} does not work with opposite_dir, {reason}")
    if values["custom_attributes"].get(PRESERVATION):
        reason = f"{PRESERVATION} trains toward the base model's own predictions, and opposite_dir away from them"
        raise conflict(place, "custom_attributes", "opposite_dir", reason)


def conflict(place: str, key: str, other: str, reason: str, remedy: str | None = "remove one of the two") -> UserError:
    return error_in(key, others=[other], cause="does not fit")(f"{place}: {reason}", remedy)
