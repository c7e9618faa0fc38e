"""The dataset file as frozen values, whose fields declare the keys of the file."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.base.suggestions import nearby
from library.data.description.captions import CaptionRules
from library.data.description.keys import (
    BATCH_SIZE,
    COUNT_FROM_1,
    EXTENSION,
    FACE_RANGE,
    FILTER,
    GD,
    GDS,
    IMAGE_SIZE,
    INT,
    ONLY_S,
    SEED,
    SIZE,
    Style,
    key,
    key_of_option,
    keys_of,
)
from library.data.description.source_keys import SOURCES
from library.options.dataset import OWN_INDEX
from library.options.declared import Declared
from library.options.kinds import BOOL, SHARE, TABLE, TEXT, TEXTS, number
from library.options.tables import Table


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
    num_repeats: int = key_of_option(INT, 1, flag="dataset_repeats", help="How often an epoch shows each image.")
    color_aug: bool = key_of_option(BOOL, False)
    brightness_aug: float = key_of_option(SHARE, 0.0)
    contrast_aug: float = key_of_option(SHARE, 0.0)
    saturation_aug: float = key_of_option(SHARE, 0.0)
    flip_aug: bool = key_of_option(BOOL, False)
    random_crop: bool = key_of_option(BOOL, False)
    face_crop_aug_range: tuple[float, float] | None = key_of_option(FACE_RANGE, None)
    resize_interpolation: str | None = key_of_option(FILTER, None)
    custom_attributes: Mapping[str, Any] = key(TABLE, {})
    """Settings of one subset. diff_output_preservation = true, or { caption, weight, num_steps }, keeps what the base
    model predicts; timestep_sampling = { offset = 0.3 } moves the timesteps of flow models toward noise, below 0 toward
    the image, and 0.5 is a lot."""
    # sd-scripts' documentation shows these two in subsets, so they are allowed there.
    validation_split: float = key_of_option(SHARE, 0.0)
    validation_seed: int | None = key_of_option(SEED, None)
    is_forgetting_probe: bool = key(BOOL, False, levels=("dataset", "subset"))
    """Never train on these images; their loss shows what the model forgets."""
    image_dir: str | None = key(TEXT, None, levels=ONLY_S)
    """Folder with png, jpg, jpeg, webp, bmp, avif, heic, heif and hif images, with jxl after `pip install
    pillow-jxl-plugin`; hidden files and folders below it are not read."""
    exclude: tuple[str, ...] = key(TEXTS, (), levels=ONLY_S, styles=("dreambooth", "masked"))
    """Names of images in image_dir that are not used."""
    image_column: str | None = key(TEXT, None, levels=GDS, styles=("dreambooth",))
    """Column of Parquet files with the images or their URLs."""
    caption_column: str | None = key(TEXT, None, levels=GDS, styles=("dreambooth",))
    """Column of Parquet files with the captions, or field of the .json members of a shard."""
    dataset_config_name: str | None = key(TEXT, None, levels=ONLY_S, styles=("dreambooth",))
    """Configuration of the data set of dataset_name. Unset is its default one."""
    dataset_split: str | None = key(TEXT, None, levels=ONLY_S, styles=("dreambooth",))
    """Split of the data set of dataset_name. Unset is train, or the only one."""
    class_tokens: str | None = key(TEXT, None, levels=GDS, styles=("dreambooth", "masked"))
    """Caption of images without a caption file."""
    is_reg: bool = key(BOOL, False, levels=ONLY_S, styles=("dreambooth",))
    """Regularisation images, weighted by --prior_loss_weight."""
    prompt: str | None = key(TEXT, None, levels=ONLY_S, styles=("dreambooth",))
    """Prompt of regularisation images that the base model draws before the training, with options as in a prompts file;
    needs is_reg and num."""
    num: int | None = key(COUNT_FROM_1, None, levels=ONLY_S, styles=("dreambooth",))
    """Number of images that are drawn with prompt."""
    # sd-scripts refuses alpha_mask above a subset.
    alpha_mask: bool = key_of_option(BOOL, False, ONLY_S, ("dreambooth", "metadata"))
    caption_extension: str = key_of_option(EXTENSION, ".caption", GDS, ("dreambooth", "masked"))
    metadata_file: str | None = key(TEXT, None, levels=ONLY_S, styles=("metadata",))
    """JSON or JSON lines file with the captions of all images."""
    conditioning_data_dir: str | None = key(TEXT, None, levels=ONLY_S, styles=("masked",))
    """Folder with masks named like the images; needs --masked_loss."""
    control_dirs: tuple[str, ...] = key(TEXTS, (), levels=ONLY_S)
    """Folders of reference images, in the order of the model's inputs."""
    control_columns: tuple[str, ...] = key(TEXTS, (), levels=GDS, styles=("dreambooth",))
    """Columns of Parquet files with reference images."""
    cache_directory: str | None = key(TEXT, None, levels=("dataset", "subset"))
    """Folder of the caches. Unset keeps them beside the images."""
    opposite_dir: str | None = key(TEXT, None, levels=ONLY_S)
    """Folder with the other image of each pair: rejected images, or the other end of a slider."""
    control_resolution: tuple[int, int] | None = key(IMAGE_SIZE, None)
    """Area that reference images keep their aspect ratio at. Unset is the size of their image."""
    control_no_resize: bool = key(BOOL, False)
    """Leave reference images at their size."""
    entries: Sequence[tuple[str, Any]] | None = field(default=None, repr=False, compare=False)  # already read, by key

    @property
    def light(self) -> dict[str, float]:
        """How far the factors of brightness, contrast and saturation may be from 1; empty if none changes."""
        values = {name: getattr(self, name) for name in ("brightness_aug", "contrast_aug", "saturation_aug")}
        return values if any(values.values()) else {}

    @property
    def changing(self) -> list[str]:
        """The keys that change the pixels in every draw."""
        return [name for name in ("random_crop", "color_aug", *self.light) if getattr(self, name)]

    @property
    def source(self) -> str:
        """The folder or files of the images, for messages and metadata."""
        part = " ".join(filter(None, (self.dataset_config_name, self.dataset_split)))
        names = ", ".join(map(strip_secrets, self.patterns))
        return self.metadata_file or self.image_dir or (f"{names} ({part})" if part else names)

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


@dataclass(frozen=True)
class UnusedKeys:
    """Keys of sd-scripts without effect."""

    network_multiplier: float = key(number(None, 2**31), 1.0, levels=GD, ignored="adapters are trained at multiplier 1")
    """Has no effect."""
    cache_info: bool = key(BOOL, False, levels=GDS, styles=("dreambooth", "masked"), ignored=OWN_INDEX)
    """Has no effect: a folder has an index."""


NETWORK_MULTIPLIER, CACHE_INFO = keys_of(UnusedKeys)
FILES = "{} files that contain images: a path, a pattern, or a list of them."
HELP_OF_SOURCES = {
    "dataset_name": "Data set for the library datasets: a Hugging Face name, which may end in @ and a branch, tag or "
    "commit; a folder; or a list of them."
}
FILE_SOURCES = [
    Declared(
        TEXTS, (), HELP_OF_SOURCES.get(name, FILES.format(name)), name, levels=ONLY_S, styles=("dreambooth",),
    )
    for name in SOURCES
    if name not in ("image_dir", "metadata_file")
]  # fmt: skip
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
