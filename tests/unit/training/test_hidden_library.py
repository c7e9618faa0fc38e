"""bitsandbytes is out of the way of runs that do not use it."""

import importlib.util
import os
import sys

import pytest

from library.training.optimization.hidden_library import NAME, hidden_bitsandbytes, show_bitsandbytes


def test_nobody_finds_it_in_the_block_and_everybody_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with hidden_bitsandbytes():
        assert importlib.util.find_spec(NAME) is None
    assert NAME not in sys.modules
    with hidden_bitsandbytes():
        show_bitsandbytes()
        assert NAME not in sys.modules


def test_one_that_is_loaded_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, os)
    with hidden_bitsandbytes():
        assert sys.modules[NAME] is os
    assert sys.modules[NAME] is os
