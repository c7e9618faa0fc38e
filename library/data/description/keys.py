"""The keys of a dataset file: names, types, allowed levels and defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from library.data.description.source_keys import SOURCES
from library.options.dataset import INTERPOLATIONS

Style = Literal["dreambooth", "metadata", "masked"]
Level = Literal["general", "dataset", "subset"]

FILTERS = (*INTERPOLATIONS, "box")


LARGEST_SIDE = 2**14  # of a trained or reference image, in pixels
LARGEST = 2**31  # upper limit of a number; also excludes nan and inf


@dataclass(frozen=True)
class Kind:
    """A type of value: its name in errors, its check, and its conversion."""

    name: str
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


def _is_pair(value: Any, of: type) -> bool:
    items: list[Any] = list(value) if isinstance(value, (list, tuple)) else []
    return len(items) == 2 and all(isinstance(item, of) for item in items) and max(map(abs, items)) < LARGEST


# bool is a subclass of int in Python, and sd-scripts accepts it in dataset files.
INT = Kind("an int", lambda v: isinstance(v, int) and abs(v) < LARGEST, int)
# As in sd-scripts, an integer is an error for these keys: `face_crop_aug_range = [1, 3]`.
FLOAT = Kind("a float (with a decimal point)", lambda v: isinstance(v, float) and math.isfinite(v))
NUMBER = Kind("a number", lambda v: isinstance(v, (int, float)) and abs(v) < LARGEST, float)
TEXT = Kind("a string", lambda v: isinstance(v, str))
EXTENSION = Kind("a string", TEXT.fits, lambda v: v if v.startswith(".") else f".{v}")
TEXTS = Kind(
    "a string or a list of strings",
    lambda v: isinstance(v, str) or (isinstance(v, list) and bool(v) and all(isinstance(item, str) for item in v)),
    lambda v: (v,) if isinstance(v, str) else tuple(v),
)
BOOL = Kind("true or false", lambda v: isinstance(v, bool))
TABLE = Kind("a table", lambda v: isinstance(v, dict))
FLOAT_PAIR = Kind("two floats, [1.0, 3.0]", lambda v: _is_pair(v, float), tuple)
SIZE = Kind(
    "an int or [width, height]",
    lambda v: (isinstance(v, int) and not isinstance(v, bool) and abs(v) < LARGEST) or _is_pair(v, int),
    lambda v: (int(v[0]), int(v[1])) if isinstance(v, (list, tuple)) else (int(v), int(v)),
)
# Images of a larger side exhaust main memory before any model sees them.
IMAGE_SIZE = Kind(
    f"{SIZE.name} of at most {LARGEST_SIDE} pixels",
    lambda v: SIZE.fits(v) and max(SIZE.convert(v)) <= LARGEST_SIDE,
    SIZE.convert,
)
SHARE = Kind("a float from 0.0 to 1.0", lambda v: isinstance(v, float) and 0 <= v <= 1)
FILTER = Kind(f"one of {', '.join(FILTERS)}", lambda v: v in FILTERS)


@dataclass(frozen=True)
class Key:
    """A key of the dataset file."""

    name: str
    kind: Kind
    default: Any
    levels: tuple[Level, ...]
    styles: tuple[Style, ...] = ("dreambooth", "metadata", "masked")
    flag: str | None = None  # the option that sets the default


GD: tuple[Level, ...] = ("general", "dataset")
GDS: tuple[Level, ...] = ("general", "dataset", "subset")
ONLY_S: tuple[Level, ...] = ("subset",)


def _with_option(name: str, kind: Kind, default: Any, levels: tuple[Level, ...], flag: str | None = None) -> Key:
    """Return a key for all styles whose default is set by the option `flag`, by default the one of the same name."""
    return Key(name, kind, default, levels, flag=flag or name)


FILE_SOURCES = tuple(name for name in SOURCES if name not in ("image_dir", "metadata_file"))
"""Sources in larger files that contain images. The value is a path, a pattern, or a list of them."""

DATASET_KEYS = (
    _with_option("batch_size", INT, 1, GD, flag="train_batch_size"),
    _with_option("resolution", IMAGE_SIZE, None, GD),
    _with_option("enable_bucket", BOOL, False, GD),
    _with_option("min_bucket_reso", INT, 256, GD),
    _with_option("max_bucket_reso", INT, 1024, GD),
    _with_option("bucket_reso_steps", INT, 64, GD),
    _with_option("bucket_no_upscale", BOOL, False, GD),
    _with_option("skip_image_resolution", SIZE, None, GD),
    Key("network_multiplier", FLOAT, 1.0, GD),
)

SUBSET_KEYS = (
    _with_option("num_repeats", INT, 1, GDS, flag="dataset_repeats"),
    _with_option("shuffle_caption", BOOL, False, GDS),
    _with_option("caption_separator", TEXT, ",", GDS),
    _with_option("keep_tokens", INT, 0, GDS),
    _with_option("keep_tokens_separator", TEXT, "", GDS),
    _with_option("secondary_separator", TEXT, None, GDS),
    _with_option("enable_wildcard", BOOL, False, GDS),
    Key("enable_multiline_caption", BOOL, False, GDS),
    _with_option("caption_prefix", TEXT, None, GDS),
    _with_option("caption_suffix", TEXT, None, GDS),
    _with_option("caption_dropout_rate", NUMBER, 0.0, GDS),
    _with_option("caption_dropout_every_n_epochs", INT, 0, GDS),
    _with_option("caption_tag_dropout_rate", NUMBER, 0.0, GDS),
    _with_option("token_warmup_min", INT, 1, GDS),
    _with_option("token_warmup_step", NUMBER, 0.0, GDS),
    _with_option("color_aug", BOOL, False, GDS),
    _with_option("flip_aug", BOOL, False, GDS),
    _with_option("random_crop", BOOL, False, GDS),
    _with_option("face_crop_aug_range", FLOAT_PAIR, None, GDS),
    _with_option("resize_interpolation", FILTER, None, GDS),
    Key("custom_attributes", TABLE, {}, GDS),
    # sd-scripts' documentation shows these two in subsets, so they are allowed there.
    _with_option("validation_split", SHARE, 0.0, GDS),
    _with_option("validation_seed", INT, None, GDS),
    Key("is_forgetting_probe", BOOL, False, ("dataset", "subset")),
    Key("image_dir", TEXT, None, ONLY_S),
    *(Key(name, TEXTS, None, ONLY_S, ("dreambooth",)) for name in FILE_SOURCES),
    Key("image_column", TEXT, None, GDS, ("dreambooth",)),
    Key("caption_column", TEXT, None, GDS, ("dreambooth",)),
    Key("class_tokens", TEXT, None, GDS, ("dreambooth", "masked")),
    Key("is_reg", BOOL, False, ONLY_S, ("dreambooth",)),
    # sd-scripts refuses alpha_mask above a subset.
    Key("alpha_mask", BOOL, False, ONLY_S, ("dreambooth", "metadata"), "alpha_mask"),
    Key("caption_extension", EXTENSION, ".caption", GDS, ("dreambooth", "masked"), "caption_extension"),
    Key("cache_info", BOOL, False, GDS, ("dreambooth", "masked")),  # no option: that has its own warning
    Key("metadata_file", TEXT, None, ONLY_S, ("metadata",)),
    Key("conditioning_data_dir", TEXT, None, ONLY_S, ("masked",)),
    Key("control_dirs", TEXTS, (), ONLY_S),
    Key("control_columns", TEXTS, (), GDS, ("dreambooth",)),
    Key("opposite_dir", TEXT, None, ONLY_S),
    Key("cache_directory", TEXT, None, ("dataset", "subset")),
    Key("control_resolution", IMAGE_SIZE, None, GDS),
    Key("control_no_resize", BOOL, False, GDS),
)

ALL_KEYS = {key.name: key for key in (*DATASET_KEYS, *SUBSET_KEYS)}

REQUIRED: dict[Style, tuple[str, ...]] = {
    "dreambooth": (),  # needs one of SOURCES instead
    "metadata": ("metadata_file",),
    "masked": ("image_dir", "conditioning_data_dir"),
}


def is_allowed_at(key: Key, level: Level, style: Style | None) -> bool:
    """Return True if the key is allowed at this level for this style; None means any style, as in [general]."""
    return level in key.levels and (style is None or style in key.styles)
