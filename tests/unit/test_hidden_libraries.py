"""bitsandbytes and scipy are out of the way of runs that do not use them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from library.hidden_libraries import BITSANDBYTES, hide_library, unhide_library
from tests.running import ROOT

pytestmark = pytest.mark.slow


def test_nobody_finds_it_in_the_block_and_everybody_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (BITSANDBYTES, "diffusers.utils.import_utils"):  # as in a new process
        monkeypatch.delitem(sys.modules, module, raising=False)
    with hide_library(BITSANDBYTES):
        assert importlib.util.find_spec(BITSANDBYTES) is None
    assert BITSANDBYTES not in sys.modules
    with hide_library(BITSANDBYTES):
        unhide_library(BITSANDBYTES)
        assert BITSANDBYTES not in sys.modules


def test_one_that_is_loaded_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BITSANDBYTES, os)
    with hide_library(BITSANDBYTES):
        assert sys.modules[BITSANDBYTES] is os
    assert sys.modules[BITSANDBYTES] is os


def test_a_run_imports_no_scipy_and_finds_it_where_it_wants_it() -> None:
    """In a process of its own: what diffusers and transformers found out they keep."""
    code = """
import sys
from library.hidden_libraries import import_diffusers_hiding_libraries
import_diffusers_hiding_libraries()
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
assert "scipy" not in sys.modules, "imported on the side"
from scipy.special import stdtrit
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.nightly
def test_what_diffusers_has_found_already_stays_visible() -> None:
    """A program may import diffusers before it trains; its lazy imports rely on what it found then."""
    code = """
import diffusers
from library.hidden_libraries import BITSANDBYTES, import_diffusers_hiding_libraries, hide_library
import_diffusers_hiding_libraries()
with hide_library(BITSANDBYTES):
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
