"""Installed packages against the versions that are needed."""

import pytest

from library import installed
from library.errors import UserError
from library.installed import check_installed, find_lack


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"transformers": "4.54.1", "diffusers": "0.36.0.dev0"}
    monkeypatch.setattr(installed, "version_of", there.get)


@pytest.mark.parametrize(
    ("requirement", "lack"),
    [
        ("transformers>=4.54", None),
        ("transformers>=5", "4.54.1 (required: >=5)"),
        ("diffusers>=0.35", None),
        ("none-such>=1", "missing"),
        ('none-such>=1; python_version < "3"', None),
    ],
)
def test_a_package_is_held_to_a_requirement(requirement: str, lack: str | None) -> None:
    found = find_lack(requirement)
    assert (None if found is None else str(found)) == lack


def test_all_packages_are_updated_together_where_one_is_too_old() -> None:
    check_installed("Knots 1", {"transformers": ">=4", "diffusers": ">=0.32"})
    with pytest.raises(UserError) as error:
        check_installed("Knots 1", {"transformers": ">=5", "diffusers": ">=0.32"})
    assert str(error.value) == (
        "The installed packages cannot train Knots 1: transformers 4.54.1 (required: >=5). "
        'Run python3 -m pip install -U "transformers>=5" "diffusers>=0.32"'
    )
