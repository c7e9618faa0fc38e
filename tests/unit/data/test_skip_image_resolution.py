"""skip_image_resolution: images whose own area is not larger are neither trained nor cached nor counted."""

import logging
import os
from pathlib import Path

import pytest

from library.base.errors import NoDataFound, UserError
from library.data.plan.data_plan import DataPlan
from library.options.train import TrainOptions
from tests.unit.data.builders import options_of, plan_of, write_config, write_image

SIZES = {"a": (64, 64), "b": (128, 32), "c": (65, 64), "d": (96, 128), "e": (300, 20)}  # b has the same area as a
SUBSET = "[[datasets.subsets]]\nimage_dir = '{here}/2_cat'\ncaption_extension = '.txt'\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (name, size) in enumerate(SIZES.items(), 40):
        path = write_image(tmp_path / "2_cat" / f"{name}.png", size, seed)
        if name in "cde":  # skipped images have no captions
            path.with_suffix(".txt").write_text(f"{name} tag", encoding="utf-8")
    return tmp_path


def trained_images(plan: DataPlan) -> list[tuple[int, str]]:
    """Return the dataset number and name of each image."""
    return [(sample.dataset, os.path.basename(sample.image.key)[0]) for sample in plan.samples]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "abcde"),
        ("--skip_image_resolution 64", "cde"),
        ("--skip_image_resolution 96,63", "d"),
        ("--skip_image_resolution 0", "abcde"),
    ],
)
def test_the_flag_compares_the_original_area_of_each_image(folder: Path, arguments: str, expected: str) -> None:
    options = options_of(f"--resolution 64 --caption_extension .txt {arguments} --train_data_dir", str(folder))
    plan = plan_of(options)
    assert trained_images(plan) == [(0, name) for name in expected]
    assert plan.num_train_images == 2 * len(expected)


def write_two_datasets(folder: Path, general: str = "") -> TrainOptions:
    high = "resolution = 128\nskip_image_resolution = [96, 64]\n"
    text = f"{general}[[datasets]]\nresolution = 64\n{SUBSET}[[datasets]]\n{high}{SUBSET}"
    return write_config(folder / "data.toml", text)


def test_datasets_over_one_folder_may_override_the_general_value(folder: Path) -> None:
    low = [(0, name) for name in "abcde"]
    assert trained_images(plan_of(write_two_datasets(folder))) == [*low, (1, "d")]
    options = write_two_datasets(folder, "[general]\nskip_image_resolution = 64\n")
    assert trained_images(plan_of(options)) == [*low[2:], (1, "d")]
    datasets = plan_of(options).metadata(options.dataset)["ss_datasets"]
    assert [dataset["skip_image_resolution"] for dataset in datasets] == [[64, 64], [96, 64]]
    assert [dataset["num_train_images"] for dataset in datasets] == [3, 1]


def test_the_audit_reports_skipped_images_but_not_their_missing_captions(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = options_of(
        "--resolution 64 --caption_extension .txt --skip_image_resolution 64 --train_data_dir", str(folder)
    )
    with caplog.at_level(logging.INFO):
        plan_of(options).audit(logging.getLogger("audit"))
    assert "2 images are skipped by skip_image_resolution" in caplog.text and "a.png" in caplog.text
    assert "captions are missing" not in caplog.text


def test_the_error_says_why_no_image_is_left(folder: Path) -> None:
    arguments = "--resolution 64 --caption_extension .txt --skip_image_resolution 512 --train_data_dir"
    with pytest.raises(NoDataFound, match="skip_image_resolution skips 5 as too small"):
        plan_of(options_of(arguments, str(folder)))
    text = (
        f"[[datasets]]\nresolution = 64\n{SUBSET}[[datasets]]\nresolution = 64\nskip_image_resolution = 200\n{SUBSET}"
    )
    with pytest.raises(UserError, match=r"no images in .*2_cat; skip_image_resolution skips 5"):
        plan_of(write_config(folder / "data.toml", text))


def test_a_value_that_is_not_a_size_is_refused(folder: Path) -> None:
    arguments = "--resolution 64 --skip_image_resolution 512x512 --train_data_dir"
    with pytest.raises(UserError, match=r"--skip_image_resolution is '512x512', but must look like 512 or 768,512"):
        plan_of(options_of(arguments, str(folder)))
