"""The dataset file as frozen values. Fields that are keys of the file say so with type, default, levels and option."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.data.description.captions import CaptionRules
from library.data.description.keys import (
    BATCH_SIZE,
    EXTENSION,
    FACE_RANGE,
    FILTER,
    GD,
    GDS,
    IMAGE_SIZE,
    INT,
    ONLY_S,
    SHARE,
    SIZE,
    Key,
    Style,
    key,
    key_of_option,
    keys_of,
)
from library.data.description.source_keys import SOURCES
from library.options.tables import BOOL, TABLE, TEXT, TEXTS, Table, number
from library.suggestions import nearby

PRESERVATION = "diff_output_preservation"  # key of a subset's custom_attributes


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
    captions: CaptionRules
    num_repeats: int = key_of_option(INT, 1, flag="dataset_repeats")
    color_aug: bool = key_of_option(BOOL, False)
    flip_aug: bool = key_of_option(BOOL, False)
    random_crop: bool = key_of_option(BOOL, False)
    face_crop_aug_range: tuple[float, float] | None = key_of_option(FACE_RANGE, None)
    resize_interpolation: str | None = key_of_option(FILTER, None)
    custom_attributes: Mapping[str, Any] = key(TABLE, {})
    # sd-scripts' documentation shows these two in subsets, so they are allowed there.
    validation_split: float = key_of_option(SHARE, 0.0)
    validation_seed: int | None = key_of_option(INT, None)
    # Images of a probe are never trained; they measure what the model forgets.
    is_forgetting_probe: bool = key(BOOL, False, ("dataset", "subset"))
    image_dir: str | None = key(TEXT, None, ONLY_S)
    image_column: str | None = key(TEXT, None, GDS, ("dreambooth",))
    caption_column: str | None = key(TEXT, None, GDS, ("dreambooth",))
    class_tokens: str | None = key(TEXT, None, GDS, ("dreambooth", "masked"))
    is_reg: bool = key(BOOL, False, ONLY_S, ("dreambooth",))
    # sd-scripts refuses alpha_mask above a subset.
    alpha_mask: bool = key_of_option(BOOL, False, ONLY_S, ("dreambooth", "metadata"))
    caption_extension: str = key_of_option(EXTENSION, ".caption", GDS, ("dreambooth", "masked"))
    metadata_file: str | None = key(TEXT, None, ONLY_S, ("metadata",))
    conditioning_data_dir: str | None = key(TEXT, None, ONLY_S, ("masked",))
    # Folders, or columns of Parquet files, of reference images in the order of the model's inputs.
    control_dirs: tuple[str, ...] = key(TEXTS, (), ONLY_S)
    control_columns: tuple[str, ...] = key(TEXTS, (), GDS, ("dreambooth",))
    # Folder of the caches; None: the images' folders.
    cache_directory: str | None = key(TEXT, None, ("dataset", "subset"))
    # Folder with the partners of pairs: rejected images, or the other end of a slider.
    opposite_dir: str | None = key(TEXT, None, ONLY_S)
    control_resolution: tuple[int, int] | None = key(IMAGE_SIZE, None)  # width, height
    control_no_resize: bool = key(BOOL, False)
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
    resize_interpolation: str | None
    subsets: tuple[SubsetConfig, ...]
    batch_size: int = key_of_option(BATCH_SIZE, 1, GD, flag="train_batch_size")
    resolution: tuple[int, int] = key_of_option(IMAGE_SIZE, None, GD)  # width, height
    enable_bucket: bool = key_of_option(BOOL, False, GD)
    min_bucket_reso: int = key_of_option(INT, 256, GD)
    max_bucket_reso: int = key_of_option(INT, 1024, GD)
    bucket_reso_steps: int = key_of_option(INT, 64, GD)
    bucket_no_upscale: bool = key_of_option(BOOL, False, GD)
    # Width and height; images with this area or less are skipped, and 0 skips none.
    skip_image_resolution: tuple[int, int] | None = key_of_option(SIZE, None, GD)


@dataclass(frozen=True)
class RunDataConfig:
    datasets: tuple[DatasetConfig, ...]
    is_from_file: bool  # from `dataset_config`, not from folder arguments

    def with_subsets(self, **values: Any) -> "RunDataConfig":
        """Return a copy with some values of every subset replaced."""
        datasets = (replace(d, subsets=tuple(replace(subset, **values) for subset in d.subsets)) for d in self.datasets)
        return replace(self, datasets=tuple(datasets))


NETWORK_MULTIPLIER = Key("network_multiplier", number(None, 2**31), 1.0, GD)  # has no effect
CACHE_INFO = Key("cache_info", BOOL, False, GDS, ("dreambooth", "masked"))  # has no effect; the option warns itself
# Sources in larger files that contain images: a path, a pattern, or a list of them.
FILE_SOURCES = [
    Key(name, TEXTS, (), ONLY_S, ("dreambooth",)) for name in SOURCES if name not in ("image_dir", "metadata_file")
]
CAPTION_KEYS, DATASET_KEYS, SUBSET_KEYS = (tuple(keys_of(kind)) for kind in (CaptionRules, DatasetConfig, SubsetConfig))
ALL_KEYS = {
    key.name: key for key in (*DATASET_KEYS, NETWORK_MULTIPLIER, *CAPTION_KEYS, *SUBSET_KEYS, *FILE_SOURCES, CACHE_INFO)
}
KINDS = {key.name: key.kind for key in ALL_KEYS.values()}
REQUIRED: dict[Style, tuple[str, ...]] = {
    "dreambooth": (),  # needs one of SOURCES instead
    "metadata": ("metadata_file",),
    "masked": ("image_dir", "conditioning_data_dir"),
}


def level_offset(attributes: Table) -> float:
    """Return timestep_sampling.offset of a subset's custom_attributes; positive values shift levels toward noise."""
    return float(attributes.get("timestep_sampling", {}).get("offset", 0.0))


def explain_missing_folder(path: str) -> str:
    """Return the end of a message about a missing folder, with a suggestion if there is one."""
    return f"{path} is not a folder{nearby(Path(path), is_folder=True)}"
