"""A warning for images far from the size that the base model was trained at."""

from pathlib import Path

import pytest

from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import RunDataConfig
from library.training.models.opening import far_resolutions, native_sides
from tests.unit.data.builders import write_config

FAMILY = {"modelspec.resolution": "1024x1024"}
TOY = Path(__file__).parents[3] / "configs" / "quickstart" / "toy_base"


def config_of(folder: Path, *sides: str) -> RunDataConfig:
    datasets = (f'[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = "a"\n' for side in sides)
    return load_dataset_config(write_config(folder / "data.toml", "".join(datasets)))


@pytest.mark.parametrize(
    ("sides", "is_far"),
    [
        (("256",), True),
        (("512",), False),
        (("1024",), False),
        (("4096",), True),
        (("[512, 2048]",), False),
        (("256", "1024"), False),  # several sizes, one of them the base model's own
    ],
)
def test_a_size_beyond_half_and_twice_the_base_models_is_warned_of(tmp_path, sides, is_far):
    lines = [*far_resolutions(config_of(tmp_path, *sides), native_sides(FAMILY, None))]
    assert bool(lines) == is_far
    if is_far:
        assert "but this base model is trained at 1024x1024" in lines[0]


def test_a_diffusers_folder_states_its_own_size(tmp_path):
    sides = native_sides({"modelspec.resolution": "512x512"}, str(TOY))
    assert sides[0] == 512 and set(sides[1:]) == {64}
    assert not [*far_resolutions(config_of(tmp_path, "64"), sides)]
    assert [*far_resolutions(config_of(tmp_path, "64"), native_sides({"modelspec.resolution": "512x512"}, None))]
