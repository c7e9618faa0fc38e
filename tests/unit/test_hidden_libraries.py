"""Runs that do not use bitsandbytes and scipy do not import them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from library.environment.hidden_libraries import BITSANDBYTES, hide_library, unhide_library
from tests.running import ROOT

pytestmark = pytest.mark.slow


def test_a_hidden_library_is_not_found_inside_the_block_and_is_found_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (BITSANDBYTES, "diffusers.utils.import_utils"):  # as in a new process
        monkeypatch.delitem(sys.modules, module, raising=False)
    with hide_library(BITSANDBYTES):
        assert importlib.util.find_spec(BITSANDBYTES) is None
    assert BITSANDBYTES not in sys.modules
    with hide_library(BITSANDBYTES):
        unhide_library(BITSANDBYTES)
        assert BITSANDBYTES not in sys.modules


def test_a_library_that_is_already_loaded_stays_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BITSANDBYTES, os)
    with hide_library(BITSANDBYTES):
        assert sys.modules[BITSANDBYTES] is os
    assert sys.modules[BITSANDBYTES] is os


def test_a_run_does_not_import_scipy_but_can_import_it_when_needed() -> None:
    """Runs in a process of its own: diffusers and transformers cache which libraries they found."""
    code = """
import sys
from library.environment.hidden_libraries import import_diffusers_hiding_libraries
import_diffusers_hiding_libraries()
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
assert "scipy" not in sys.modules, "imported on the side"
from scipy.special import stdtrit
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.nightly
def test_a_library_that_diffusers_has_already_found_stays_visible() -> None:
    """A program may import diffusers before it trains; its lazy imports rely on the libraries found then."""
    code = """
import diffusers
from library.environment.hidden_libraries import BITSANDBYTES, import_diffusers_hiding_libraries, hide_library
import_diffusers_hiding_libraries()
with hide_library(BITSANDBYTES):
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
