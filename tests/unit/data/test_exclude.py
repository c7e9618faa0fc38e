"""exclude: images of a folder that a subset does not use."""

import logging
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.data.plan.data_plan import DataPlan, build_plan
from library.options.train import TrainOptions
from tests.running import make_images
from tests.unit.data.builders import SPEC


def plan_of(folder: Path, keys: str, source: str = "") -> DataPlan:
    subset = source or f"image_dir = '{folder}'"
    (folder / "dataset.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}\nclass_tokens = 'x'\n{keys}\n"
    )
    options = TrainOptions().with_values({"dataset_config": str(folder / "dataset.toml"), "max_train_steps": 1})
    return build_plan(options, SPEC, 0, lambda text: len(text), None, 1)


def test_excluded_images_are_neither_trained_nor_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path / "photos", 3)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        plan = plan_of(tmp_path / "photos", "exclude = ['01.png', 'broken.png', '09.png']")
        plan.audit(logging.getLogger())
    assert [Path(sample.image.key).name for sample in plan.samples] == ["00.png", "02.png"]
    assert plan.num_train_images == 2
    assert "exclude names what is no image in" in caplog.text and "09.png" in caplog.text
    assert "broken.png" not in caplog.text


def test_exclude_is_refused_for_other_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exclude"):
        plan_of(tmp_path, "exclude = ['01.png']", "shards = 'a.tar'")
