"""Dataset files of musubi-tuner, where each dataset is a folder or a JSONL file."""

import json
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import RunDataConfig
from library.options.train import TrainOptions


def read_config(path: Path, text: str) -> RunDataConfig:
    path.write_text(text)
    return load_dataset_config(TrainOptions().with_values({"dataset_config": str(path)}))


GENERAL = """
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true
bucket_no_upscale = false
"""


def test_a_dataset_that_is_a_folder_has_one_subset(tmp_path: Path) -> None:
    config = read_config(
        tmp_path / "data.toml",
        f"""{GENERAL}
[[datasets]]
image_directory = "images"
cache_directory = "cache"
num_repeats = 3

[[datasets]]
image_jsonl_file = "more.jsonl"
resolution = 512
bucket_no_upscale = true
""",
    )
    first, second = config.datasets
    assert (first.resolution, first.batch_size, first.enable_bucket) == ((960, 544), 2, True)
    assert (first.min_bucket_reso, first.max_bucket_reso, first.bucket_reso_steps) == (0, 3840, 0)
    (subset,) = first.subsets
    assert (subset.image_dir, subset.num_repeats, subset.caption_extension) == ("images", 3, ".txt")
    assert subset.cache_directory == "cache"
    (subset,) = second.subsets
    assert (subset.metadata_file, subset.num_repeats, subset.style) == ("more.jsonl", 1, "metadata")
    assert second.bucket_no_upscale and second.resolution == (512, 512)


def test_a_flat_dataset_equals_one_with_a_subset(tmp_path: Path) -> None:
    flat = read_config(tmp_path / "a.toml", f'{GENERAL}[[datasets]]\nimage_directory = "images"\nflip_aug = true\n')
    steps = "bucket_reso_steps = 0\nmin_bucket_reso = 0\nmax_bucket_reso = 3840\nflip_aug = true\n"
    nested = f'{GENERAL}[[datasets]]\n{steps}[[datasets.subsets]]\nimage_dir = "images"\n'
    assert flat == read_config(tmp_path / "b.toml", nested)


def test_json_files_may_be_flat(tmp_path: Path) -> None:
    content = {"datasets": [{"image_directory": "images", "resolution": 256}]}
    config = read_config(tmp_path / "data.json", json.dumps(content))
    assert config.datasets[0].subsets[0].image_dir == "images"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[datasets]]\nvideo_directory = "v"\n', r"\['subsets'\] must be an array of tables"),
        ('[[datasets]]\nimage_directory = "a"\nmultiple_target = true\n', r"\['multiple_target'\] is not a key"),
        ("[[datasets]]\nimage_directory = 3\n", r"\['image_dir'\] is 3, but must be text in quotes"),
        (
            '[[datasets]]\nimage_directory = "a"\n[[datasets.subsets]]\nimage_dir = "b"\n',
            r"\['image_directory'\] is not a key",
        ),
    ],
)
def test_invalid_keys_raise_errors_that_name_them(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "data.toml", text)
