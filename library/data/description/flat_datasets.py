"""Dataset files of musubi-tuner, in which each [[datasets]] is a single folder or metadata file."""

from collections.abc import Mapping, Sequence
from typing import Any

from library.base.errors import of_file

SOURCES = {"image_directory": "image_dir", "image_jsonl_file": "metadata_file"}  # its key -> the key of a subset
REFERENCES = {"control_directory": "control_dirs"}
# Its keys at any level, earlier with the name of a model before them -> ours.
RENAMED = {"no_resize_control": "control_no_resize", "control_resolution": "control_resolution"}
BUCKET_STEP, MAX_BUCKET = 0, 1024  # 0 selects the step that the base model requires


def with_subsets(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the content of a dataset file, adding a subset to each dataset that names its images itself.

    By default, the buckets of such a dataset have the steps that the base model requires, and sides up to four times
    the longest side of the resolution. Other datasets are unchanged.
    """
    datasets = content.get("datasets")
    if not isinstance(datasets, list):
        return dict(content)
    renamed = rename_keys(content, path)
    general = renamed.get("general")
    tables = [general] if isinstance(general, dict) else []
    return {**renamed, "datasets": [with_subset(dataset, tables) for dataset in renamed["datasets"]]}


def rename_keys(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the content with our names of musubi-tuner's keys, in `general` and in datasets without subsets.

    Raises UserError for a key under two names with different values.
    """
    renamed = {**content, "datasets": [rename_in(table, path) for table in content["datasets"]]}
    return {**renamed, "general": rename_in(content["general"], path)} if "general" in content else renamed


def rename_in(table: Any, path: str) -> Any:
    if not isinstance(table, dict) or "subsets" in table:
        return table
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = next((ours for theirs, ours in RENAMED.items() if key == theirs or key.endswith(f"_{theirs}")), key)
        if values.setdefault(name, value) != value:
            raise of_file(path)(f": {key} has another value than a key of the same meaning", "remove one of them")
    return values


def with_subset(dataset: Any, outer: Sequence[Mapping[str, Any]]) -> Any:
    """Return a dataset with its subset; `outer` holds the tables from which it inherits keys."""
    if not isinstance(dataset, dict) or "subsets" in dataset or not dataset.keys() & SOURCES.keys():
        return dataset
    resolution = next((table["resolution"] for table in (dataset, *outer) if "resolution" in table), MAX_BUCKET)
    sides = resolution if isinstance(resolution, list) else [resolution]
    longest = max((side for side in sides if isinstance(side, int)), default=MAX_BUCKET)
    bucket_defaults = {"bucket_reso_steps": BUCKET_STEP, "min_bucket_reso": BUCKET_STEP, "max_bucket_reso": 4 * longest}
    given_keys = {key for table in (dataset, *outer) for key in table}
    names = SOURCES | REFERENCES
    dataset_values = {key: value for key, value in dataset.items() if key not in names}
    subset = {name: dataset[key] for key, name in names.items() if key in dataset}
    return {
        **{key: value for key, value in bucket_defaults.items() if key not in given_keys},
        **dataset_values,
        "subsets": [subset],
    }
