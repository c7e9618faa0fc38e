"""The dataset file as frozen values, each from the first that sets it: subset, dataset, general, option, default."""

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from library.data.description.captions import CaptionRules
from library.data.description.flat_datasets import with_subsets
from library.data.description.keys import (
    ALL_KEYS,
    DATASET_KEYS,
    FILE_SOURCES,
    IMAGE_SIZE,
    LARGEST,
    REQUIRED,
    SUBSET_KEYS,
    Key,
    Level,
    Style,
    is_allowed_at,
)
from library.data.description.overridden import find_overridden, given_keys, typed_default_keys
from library.data.description.source_keys import SOURCES, keys_used_by
from library.errors import UserError
from library.json_text import InvalidJson, parse_json
from library.options.config_file import read_toml, refuse_unusable
from library.options.dataset import OWN_INDEX, DatasetOptions
from library.options.encodings import decode_utf8
from library.options.ranges import is_finite_number
from library.options.train import TrainOptions
from library.suggestions import did_you_mean, nearby

logger = logging.getLogger(__name__)

Table = Mapping[str, Any]

PRESERVATION = "diff_output_preservation"  # key of a subset's custom_attributes


class NoDataFound(UserError):
    """There are no training images. Front ends search for the start of the message, "No data found"."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"No data found: {reason}")


def strip_secrets(url: str) -> str:
    """Remove user, password, signature and other parameters from a URL. Paths are returned unchanged."""
    scheme, separator, address = url.partition("://")
    if not separator:
        return url
    # Signatures and tokens are parameters. A password may contain @, so the host begins after the last one.
    host, slash, path = re.split(r"[?#]", address, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


@dataclass(frozen=True)
class SubsetConfig:
    """A folder, a metadata file, or larger files that contain images."""

    style: Style
    source_key: str  # the key that names the source of the images
    patterns: tuple[str, ...]  # the larger files with images; empty if images are separate files
    image_dir: str | None
    image_column: str | None
    caption_column: str | None
    metadata_file: str | None
    conditioning_data_dir: str | None
    control_dirs: tuple[str, ...]  # folders of reference images, in the order of the model's inputs
    control_columns: tuple[str, ...]  # columns of reference images in Parquet files, in the same order
    cache_directory: str | None  # folder of its caches; None: the images' folders
    opposite_dir: str | None  # folder with the partners of pairs: rejected images, or the other end of a slider
    control_resolution: tuple[int, int] | None  # width, height
    control_no_resize: bool
    num_repeats: int
    class_tokens: str | None
    is_reg: bool
    caption_extension: str
    alpha_mask: bool
    color_aug: bool
    flip_aug: bool
    random_crop: bool
    face_crop_aug_range: tuple[float, float] | None
    resize_interpolation: str | None
    custom_attributes: Mapping[str, Any]
    validation_split: float
    validation_seed: int | None
    is_forgetting_probe: bool  # images are never trained; they measure what the model forgets
    captions: CaptionRules
    keeps_index: bool = True  # an index of the images may be written
    entries: Sequence[tuple[str, Any]] | None = field(default=None, repr=False, compare=False)  # already read, by key

    @property
    def source(self) -> str:
        """The folder or files of the images, for messages and metadata."""
        return self.metadata_file or self.image_dir or ", ".join(map(strip_secrets, self.patterns))

    @property
    def base_name(self) -> str:
        """The name of the source in the metadata of saved files."""
        return os.path.basename(os.path.normpath(strip_secrets(self.patterns[0]) if self.patterns else self.source))


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share a resolution and a batch size."""

    style: Style
    batch_size: int
    resolution: tuple[int, int]  # width, height
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    skip_image_resolution: tuple[int, int] | None  # width, height; images with this area or less are skipped
    resize_interpolation: str | None
    subsets: tuple[SubsetConfig, ...]


@dataclass(frozen=True)
class RunDataConfig:
    """The data of a run."""

    datasets: tuple[DatasetConfig, ...]
    is_from_file: bool  # from `dataset_config`, not from folder arguments

    def with_subsets(self, **values: Any) -> "RunDataConfig":
        """Return a copy with some values of every subset replaced."""
        datasets = (replace(d, subsets=tuple(replace(subset, **values) for subset in d.subsets)) for d in self.datasets)
        return replace(self, datasets=tuple(datasets))


def load_dataset_config(options: TrainOptions) -> RunDataConfig:
    """Read the description of the data from `dataset_config`, else `in_json`, else the image folders.

    Raises UserError naming file and place: unreadable TOML or JSON, unknown or misplaced keys, wrong types, missing
    keys, and unsupported settings.
    """
    data = options.dataset
    if data.dataset_class:
        raise UserError(
            f"--dataset_class {data.dataset_class} makes batches during training, but this requires the images "
            "themselves; describe them with --dataset_config"
        )
    fallbacks = option_values(options.flat())
    config = read_dataset_config(data, fallbacks)
    warn_of_idle_masks(data, config)
    return config


def read_dataset_config(data: DatasetOptions, fallbacks: Table) -> RunDataConfig:
    """Read the description as `load_dataset_config` does; `fallbacks` are the values of options."""
    if data.dataset_config is None:
        return RunDataConfig((folder_dataset(data, fallbacks),), is_from_file=False)
    folder_flags = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")
    warn_of_ignored(data, folder_flags, "--dataset_config describes the data")
    path = str(data.dataset_config)
    # Datasets without subsets get theirs first, so that the checks know one form only.
    content = with_subsets(read_description(path), path)
    problems = find_problems(content, data.masked_loss)
    if problems:
        raise UserError(f"{path}: " + "\n  ".join(["invalid dataset description", *problems]))
    general = content.get("general", {})
    tables = with_styles(content, data)
    for line in find_overridden(given_keys(fallbacks), tables, general, fallbacks, path):
        logger.warning("%s", line)
    datasets = tuple(
        build_dataset(dataset, general, fallbacks, style, f"{path}: data['datasets'][{i}]")
        for i, (dataset, style) in enumerate(tables)
    )
    warn_of_unused(general, {dataset.style for dataset in datasets}, path)
    return RunDataConfig(datasets, is_from_file=True)


def warn_of_overridden_defaults(options: TrainOptions, typed: Collection[str]) -> None:
    """Warn of options that were typed with their default, and that the dataset file overrides with another value."""
    data, fallbacks = options.dataset, option_values(options.flat())
    keys = typed_default_keys(fallbacks, typed)
    if not keys or data.dataset_config is None or data.dataset_class:
        return
    path = str(data.dataset_config)
    content = with_subsets(read_description(path), path)
    if find_problems(content, data.masked_loss):
        return  # the file is refused when it is loaded
    for line in find_overridden(keys, with_styles(content, data), content.get("general", {}), fallbacks, path):
        logger.warning("%s", line)


def with_styles(content: Table, data: DatasetOptions) -> list[tuple[Table, Style]]:
    """Return the data sets of a checked description, each with its style."""
    return [(dataset, resolve_style(dataset, data.masked_loss)) for dataset in content.get("datasets", [])]


def warn_of_idle_masks(data: DatasetOptions, config: RunDataConfig) -> None:
    """Warn about options for masks that no subset can use."""
    subsets = [subset for dataset in config.datasets for subset in dataset.subsets]
    have_files = [bool(subset.conditioning_data_dir) for subset in subsets]
    if data.masked_loss and not any(have_files) and not any(subset.alpha_mask for subset in subsets):
        logger.warning("--masked_loss has no effect: no subset has masks; set conditioning_data_dir or alpha_mask")
    if data.alpha_mask and subsets and all(have_files):
        logger.warning("--alpha_mask has no effect: the masks of conditioning_data_dir are used")


# Reading


def read_description(path: str) -> dict[str, Any]:
    """Read a .toml or .json file.

    Raises UserError if it is missing, or naming the file, line and column of a mistake.
    """
    label, extension = f"--dataset_config {path}", os.path.splitext(path)[1].lower()
    if extension not in (".toml", ".json"):
        raise UserError(f"{label}: the file must end in .toml or .json")
    if extension == ".toml":
        return read_toml(Path(path), "--dataset_config")
    try:
        raw = Path(path).read_bytes()
        content = parse_json(decode_utf8(raw, label))
    except FileNotFoundError:
        raise UserError(f"--dataset_config is {path}, but there is no such file") from None
    except OSError as error:
        raise UserError(f"{label} cannot be read: {error.strerror}; change its permissions") from error
    except InvalidJson as error:
        raise UserError(f"{label} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{label}: expected a table with general and datasets, got {type(content).__name__}")
    refuse_unusable(content, label)
    return content


# Checking


def find_problems(content: Table, masked_loss: bool) -> list[str]:
    """Return all mistakes in a description, one sentence each with its place."""
    problems = [
        unknown_key(f"data['{key}']", key, ("general", "datasets")) for key in content.keys() - {"general", "datasets"}
    ]
    general, datasets = content.get("general", {}), content.get("datasets", [])
    if not isinstance(general, dict):
        problems.append("data['general'] must be a table, [general]")
    else:
        problems += table_problems(general, "data['general']", "general", None)
    if not is_table_list(datasets):
        return [*problems, "data['datasets'] must be an array of tables, [[datasets]]"]
    for i, dataset in enumerate(datasets):
        place = f"data['datasets'][{i}]"
        subsets = dataset.get("subsets")
        if not is_table_list(subsets):
            problems.append(f"{place}['subsets'] must be an array of tables, [[datasets.subsets]]")
            continue
        try:
            style = resolve_style(dataset, masked_loss)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        dataset_values = {name: value for name, value in dataset.items() if name != "subsets"}
        problems += table_problems(dataset_values, place, "dataset", style)
        for j, subset in enumerate(subsets):
            subset_place = f"{place}['subsets'][{j}]"
            problems += table_problems(subset, subset_place, "subset", style)
            if style == "dreambooth":
                problems += source_problems(subset, subset_place)
            problems += [
                f"{subset_place}['{name}'] is missing, a {style} subset needs it"
                for name in REQUIRED[style]
                if name not in subset
            ]
    return problems


def source_problems(subset: Table, place: str) -> list[str]:
    """Return the mistakes in the image source of a subset: it must have exactly one, with keys that the source uses."""
    given_sources = [name for name in SOURCES if name in subset]
    if not given_sources:
        return [f"{place}['image_dir'] is missing: set a folder, or tar files as shards, or Parquet files as parquet"]
    if len(given_sources) > 1:
        return [f"{place} has {' and '.join(given_sources)}; each is a separate source; use two subsets"]
    return [
        f"{place}['{name}'] has no effect with {given_sources[0]}; it is for {' and '.join(sources)}"
        for name in subset
        if (sources := [source for source in SOURCES if name in keys_used_by(source)])
        and given_sources[0] not in sources
    ]


def is_table_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def resolve_style(dataset: Table, masked_loss: bool) -> Style:
    """Return the style of a dataset's subsets. Raises UserError if styles are mixed."""
    subsets: Sequence[Table] = dataset["subsets"]
    # As in sd-scripts, masks decide before metadata files.
    if masked_loss and subsets and all("conditioning_data_dir" in subset for subset in subsets):
        return "masked"
    if any("conditioning_data_dir" in subset for subset in subsets):
        if masked_loss:
            raise UserError("only some subsets have conditioning_data_dir; use masks for all subsets or none")
        raise UserError("conditioning_data_dir requires --masked_loss")
    has_metadata = ["metadata_file" in subset for subset in subsets]
    if any(has_metadata) and not all(has_metadata):
        raise UserError("only some subsets have metadata_file; use separate datasets")
    return "metadata" if any(has_metadata) else "dreambooth"


def table_problems(table: Table, place: str, level: Level, style: Style | None) -> list[str]:
    """Return a sentence for each unknown, misplaced or mistyped key of a table."""
    problems = []
    allowed = [key.name for key in ALL_KEYS.values() if is_allowed_at(key, level, style)]
    for name, value in table.items():
        key = ALL_KEYS.get(name)
        if key is None:
            problems.append(unknown_key(f"{place}['{name}']", name, allowed))
        elif not is_allowed_at(key, level, style):
            problems.append(f"{place}['{name}'] {explain_where_it_belongs(key, level)}")
        elif not key.kind.fits(value):
            problems.append(f"{place}['{name}'] is {value!r}, but must be {key.kind.name}{explain_limit(key, value)}")
    return problems


def unknown_key(place: str, name: str, allowed: Sequence[str]) -> str:
    return f"{place} is not a key{did_you_mean(name, [*allowed, *ALL_KEYS])}"


def explain_where_it_belongs(key: Key, level: Level) -> str:
    headings = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
    if level not in key.levels:
        return f"is not allowed here; it belongs in {' or '.join(headings[name] for name in key.levels)}"
    return f"is not allowed here; it is only for subsets of style {' or '.join(key.styles)}"


def warn_of_unused(general: Table, styles: AbstractSet[Style], path: str) -> None:
    """Warn about keys of [general] that no dataset of the file can use."""
    for name in general:
        if styles and styles.isdisjoint(ALL_KEYS[name].styles):
            logger.warning(
                "%s: %s in [general] has no effect: it is for subsets of style %s, and all are of style %s",
                path,
                name,
                " or ".join(ALL_KEYS[name].styles),
                " or ".join(sorted(styles)),
            )


# Building


def option_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of options that are defaults of keys, checked like values of the file. None means not given."""
    values = {key.name: options[key.flag] for key in ALL_KEYS.values() if key.flag}
    # sd-scripts has the option under both spellings, and the misspelt one wins.
    values["caption_extension"] = options["caption_extention"] or options["caption_extension"]
    for name in ("resolution", "skip_image_resolution"):
        if isinstance(values[name], str):
            sides = parse_numbers(f"--{name}", values[name], int, (1, 2), "512 or 768,512")
            values[name] = sides if len(sides) == 2 else sides[0]
    if isinstance(values["face_crop_aug_range"], str):
        values["face_crop_aug_range"] = parse_numbers(
            "--face_crop_aug_range", values["face_crop_aug_range"], float, (2,), "1.0,3.0"
        )
    for name, value in values.items():
        key = ALL_KEYS[name]
        if isinstance(value, float) and value.is_integer() and key.kind.fits(1) and not isinstance(key.default, float):
            # Some front ends write every number with a decimal point.
            values[name] = int(value)
        elif isinstance(value, int) and not key.kind.fits(value) and key.kind.fits(float(value)):
            values[name] = float(value)
        if values[name] is not None and not key.kind.fits(values[name]):
            raise UserError(f"--{key.flag} is {value!r}, but must be {key.kind.name}")
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


def resolve_value(key: Key, tables: Sequence[Table]) -> Any:
    """Return the first value that is set, converted. `tables` are ordered by precedence."""
    for table in tables:
        value = table.get(key.name)
        # false, 0 and "" are values too: in the file they override the command line, as in sd-scripts.
        if value is not None:
            return key.kind.convert(value)
    return key.default


def build_dataset(dataset: Table, general: Table, fallbacks: Table, style: Style, place: str) -> DatasetConfig:
    """Build one dataset with its subsets; `place` is for messages."""
    tables = (dataset, general, fallbacks)
    values = {key.name: resolve_value(key, tables) for key in DATASET_KEYS}
    if values["resolution"] is None:
        raise UserError(f"{place}['resolution'] is missing; set it there, in [general], or with --resolution")
    if values["batch_size"] < 1:
        raise UserError(f"{place}['batch_size'] is {values['batch_size']}, but must be at least 1")
    skip_resolution = values["skip_image_resolution"]
    if skip_resolution is not None and min(skip_resolution) < 0:
        raise UserError(
            f"{place}['skip_image_resolution'] is {list(skip_resolution)}; use sizes in pixels; 0 skips nothing"
        )
    if values.pop("network_multiplier") != 1.0:
        logger.warning("%s['network_multiplier'] has no effect: adapters are trained at multiplier 1", place)
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
    values = {
        key.name: resolve_value(key, (subset, *outer)) if style in key.styles else key.default for key in SUBSET_KEYS
    }
    if values.pop("cache_info"):
        logger.warning("%s['cache_info'] has no effect: %s", place, OWN_INDEX)
    rules = CaptionRules(**{field.name: values.pop(field.name) for field in fields(CaptionRules)})
    check_subset(values, rules, place)
    check_attributes(values["custom_attributes"], place)
    patterns_by_source = {name: values.pop(name) for name in FILE_SOURCES}
    source = next((name for name in FILE_SOURCES if patterns_by_source[name]), "image_dir")
    patterns = patterns_by_source.get(source, ())
    source = "metadata_file" if style == "metadata" else source
    return SubsetConfig(style=style, captions=rules, source_key=source, patterns=patterns, **values)


def level_offset(attributes: Table) -> float:
    """Return timestep_sampling.offset of a subset's custom_attributes; positive values shift levels toward noise."""
    return float(attributes.get("timestep_sampling", {}).get("offset", 0.0))


def check_attributes(attributes: Table, place: str) -> None:
    """Raise UserError for custom_attributes with impossible values, and warn about those that have no effect."""
    place = f"{place}['custom_attributes']"
    sampling, preserves = attributes.get("timestep_sampling", {}), attributes.get(PRESERVATION, False)
    if not isinstance(sampling, dict):
        raise UserError(f"{place}: timestep_sampling is {sampling!r}, but must be a table, {{ offset = 0.3 }}")
    offset = sampling.get("offset", 0.0)
    if not is_finite_number(offset):
        raise UserError(f"{place}: timestep_sampling.offset is {offset!r}, but must be a number, such as 0.3")
    if not isinstance(preserves, bool):
        raise UserError(f"{place}: {PRESERVATION} is {preserves!r}, but must be true or false")
    for table, names, prefix in (
        (attributes, ("timestep_sampling", PRESERVATION), ""),
        (sampling, ("offset",), "timestep_sampling."),
    ):
        for name in table.keys() - set(names):
            logger.warning("%s: %s%s has no effect%s", place, prefix, name, did_you_mean(name, names))


def check_subset(values: Table, rules: CaptionRules, place: str) -> None:
    """Raise UserError for values that have a valid type but not a valid meaning."""
    if not rules.caption_separator:
        raise UserError(f"{place}: caption_separator is empty; it must be a text such as ','")
    for name in ("caption_dropout_rate", "caption_tag_dropout_rate"):
        if not 0 <= getattr(rules, name) <= 1:
            raise UserError(f"{place}: {name} is {getattr(rules, name)}, but must lie between 0 and 1")
    for name in ("keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_min", "token_warmup_step"):
        if getattr(rules, name) < 0:
            raise UserError(f"{place}: {name} is {getattr(rules, name)}, but must not be negative")
    if values["is_forgetting_probe"] and values["is_reg"]:
        raise UserError(
            f"{place}: is_forgetting_probe keeps images out of training, and is_reg trains them; remove one of the two"
        )
    face_range = values["face_crop_aug_range"]
    if face_range is not None and not 0 < face_range[0] <= face_range[1]:
        raise UserError(
            f"{place}: face_crop_aug_range is {list(face_range)}, but must be two positive numbers, the smaller first"
        )
    if values["conditioning_data_dir"] and values["random_crop"]:
        raise UserError(
            f"{place}: random_crop does not work with conditioning_data_dir: masks are cropped at the centre"
        )
    if values["opposite_dir"]:
        check_opposites(values, place)
    size = values["control_resolution"]
    if size is not None and min(size) < 1:
        raise UserError(f"{place}: control_resolution is {list(size)}; use sizes in pixels, such as 1024")


def check_opposites(values: Table, place: str) -> None:
    """Raise UserError for keys of a subset that conflict with opposite_dir."""
    for name in ("control_dirs", "control_resolution", "control_no_resize", "is_reg"):
        if values[name]:
            raise UserError(
                f"{place}: {name} does not work with opposite_dir, whose images are trained as pairs with those of the "
                "subset at equal size; remove one of the two"
            )
    if values["custom_attributes"].get(PRESERVATION):
        raise UserError(
            f"{place}: {PRESERVATION} trains toward the base model's own predictions, and opposite_dir away from them; "
            "remove one of the two"
        )


def explain_limit(key: Key, value: Any) -> str:
    """Return the end of a message about a wrong value: the limit, if the number is too large for any key."""
    is_too_large = isinstance(value, (int, float)) and abs(value) >= LARGEST
    return " below 2^31" if is_too_large and key.kind is not IMAGE_SIZE else ""


# Folder arguments


def folder_dataset(data: DatasetOptions, fallbacks: Table) -> DatasetConfig:
    """Build the dataset that `train_data_dir`, `reg_data_dir`, `in_json` and `conditioning_data_dir` describe."""
    subsets: list[Table]
    style: Style = "dreambooth"
    if data.in_json:
        warn_of_ignored(data, ("reg_data_dir", "conditioning_data_dir"), "--in_json describes all images")
        style, subsets = "metadata", [{"image_dir": data.train_data_dir, "metadata_file": data.in_json}]
    elif not data.train_data_dir:
        raise NoDataFound("use --dataset_config or --train_data_dir")
    elif data.conditioning_data_dir:
        if not data.masked_loss:
            raise UserError("--conditioning_data_dir requires --masked_loss")
        warn_of_ignored(data, ("reg_data_dir",), "with --conditioning_data_dir all images have masks")
        style = "masked"
        subsets = [{"image_dir": data.train_data_dir, "conditioning_data_dir": data.conditioning_data_dir}]
    else:
        subsets = list_numbered_folders("--train_data_dir", data.train_data_dir, is_reg=False)
        if data.reg_data_dir:
            subsets += list_numbered_folders("--reg_data_dir", data.reg_data_dir, is_reg=True)
        if not any(not subset["is_reg"] for subset in subsets):
            num_direct = num_images_in(data.train_data_dir)
            raise NoDataFound(
                f"--train_data_dir {data.train_data_dir} must be the parent of image folders "
                "called N_name, such as 10_cat"
                + (f"; it directly contains {num_direct} images, move them into such a folder" if num_direct else "")
            )
    return build_dataset({"subsets": subsets}, {}, fallbacks, style, "command line")


def warn_of_ignored(data: DatasetOptions, flags: Sequence[str], reason: str) -> None:
    """Warn about those of the options `flags` that are given although something else replaces them."""
    for flag in flags:
        if getattr(data, flag):
            logger.warning("--%s is ignored: %s", flag, reason)


def num_images_in(folder: str) -> int:
    """Count the images of a folder by extension, without its subfolders."""
    # Imported here because it imports Pillow, which nothing else in this module needs.
    from library.data.description.image_extensions import image_extensions

    return sum(os.path.splitext(name)[1] in image_extensions() for name in os.listdir(folder))


def explain_missing_folder(path: str) -> str:
    """Return the end of a message about a missing folder, with a suggestion if there is one."""
    return f"{path} is not a folder{nearby(Path(path), is_folder=True)}"


def list_numbered_folders(flag: str, parent: str, is_reg: bool) -> list[Table]:
    """Return the subfolders of `parent` named `N_name` as subsets, sorted by name: N repeats of class `name`."""
    if not os.path.isdir(parent):
        raise (UserError if is_reg else NoDataFound)(f"{flag} {explain_missing_folder(parent)}")
    subsets: list[Table] = []
    # Sorted, because the order of the file system, which sd-scripts takes, differs between machines.
    for name in sorted(entry.name for entry in os.scandir(parent) if os.path.isdir(entry.path)):
        # Further underscores belong to the class: 10_my_cat is 10 repeats of my_cat.
        number, _, class_tokens = name.partition("_")
        try:
            num_repeats = int(number)
        except ValueError:
            logger.warning("%s: folder %s is skipped: its name does not start with a number of repeats", flag, name)
            continue
        if num_repeats < 1:
            logger.info("%s: folder %s is skipped: it has %d repeats", flag, name, num_repeats)
            continue
        path = os.path.join(parent, name)
        subsets.append({"image_dir": path, "num_repeats": num_repeats, "class_tokens": class_tokens, "is_reg": is_reg})
    return subsets
