"""The known name or file that is nearest to a misspelt one."""

from pathlib import Path

import pytest

from library.base.suggestions import did_you_mean, nearby, nearest_name

KNOWN = ["AdamW", "AdamW8bit", "Lion", "Prodigy"]


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("adamw", "AdamW"), ("AdamW_8bit", "AdamW8bit"), ("LIONS", "Lion"), ("sgd", None), ("", None)],
)
def test_the_nearest_name_is_found_ignoring_case(typed: str, nearest: str | None) -> None:
    assert nearest_name(typed, iter(KNOWN)) == nearest
    assert did_you_mean(typed, KNOWN) == (f" (did you mean {nearest}?)" if nearest else "")


def test_the_required_similarity_can_be_set() -> None:
    assert nearest_name("Prod", KNOWN) == "Prodigy"  # 2 x 4 of 4 + 7 letters, 0.73
    assert nearest_name("Prod", KNOWN, least=0.75) is None


def test_the_nearest_path_is_a_folder_if_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "my_cats").mkdir()
    (tmp_path / "my_cat.zip").touch()
    assert nearby(tmp_path / "my_cat.zap") == f"; did you mean {tmp_path / 'my_cat.zip'}?"
    assert nearby(tmp_path / "my_cat.zap", is_folder=True) == f"; did you mean {tmp_path / 'my_cats'}?"
    assert nearby(tmp_path / "dogs") == ""
    assert nearby(tmp_path / "dogs" / "10_dog") == f"; only {tmp_path} exists"
