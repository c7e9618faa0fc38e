"""The line of a key in a TOML file."""

from pathlib import Path

import pytest

from library.options.toml_lines import find_line

TEXT = """\
seed = 1  # seed = 2
"max_steps" = 3
[general]
flip_aug = true
sides = [
  [512, 768],
  ["a"]
]
[[datasets]]  # the first
resolution = 512
  [[datasets.subsets]]
  image_dir = "num_repeats = 3"
  [[ datasets . "subsets" ]]
  num_repeats = 2
[[datasets]]
resolution = 768
  [[datasets.subsets]]
  num_repeats = 4
  [datasets.subsets.custom_attributes]
  seed = 1
[prompt]
[[prompt.subset]]
[[prompt.subset]]
width = 64
"""


@pytest.mark.parametrize(
    ("setting", "place", "line"),
    [
        ("--max_steps", None, 2),
        ("flip_aug", "data['general']", 4),
        ("resolution", "data['datasets'][0]", 10),
        ("resolution", "data['datasets'][1]", 16),
        ("num_repeats", "data['datasets'][0]['subsets'][1]", 14),
        ("num_repeats", "data['datasets'][1]['subsets'][0]", 18),
        ("width", "[[prompt.subset]] number 2", 24),
        ("seed", "data", 1),
        ("seed", None, None),  # twice
        ("num_repeats", "data['datasets'][0]['subsets'][0]", None),  # in a text
        ("width", "[[prompt.subset]] number 1", None),
        ("image_dir", "data['datasets'][1]['subsets'][1]", None),  # as of an inline table
    ],
)
def test_the_line_is_that_of_the_key_in_its_table(setting: str, place: str, line: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(TEXT, encoding="utf-8-sig")
    assert find_line(path, setting, place) == line


def test_a_text_of_several_lines_and_a_missing_file_say_none(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('seed = 1\nnote = """\nsteps = 2\n"""\n')
    assert find_line(path, "seed", None) is None and find_line(tmp_path / "b.toml", "seed", None) is None
