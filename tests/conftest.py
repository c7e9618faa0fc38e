"""Fixtures that every suite shares."""

import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.base.collector import keep_imported
from tests.running import base_arguments, fresh_process, images, launch, tiny_model, train  # noqa: F401
from tests.tiers import is_of_new_base

SLOW_FOLDERS = ("made_up", "parity", "runs")
MANY_MODULES = 20
MODULES_KEPT = pytest.StashKey[int]()


def pytest_configure() -> None:
    """Pause garbage collection while tests are collected: a third of the time went into scans of what stays alive."""
    gc.disable()


@pytest.hookimpl(tryfirst=True)  # before -m selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole training runs and comparisons of whole models as slow, and those of new base models no rarer."""
    tests = Path(__file__).parent
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and is_of_new_base(callspec.params):
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "nightly"]
            item.add_marker(pytest.mark.slow)
        if item.path.relative_to(tests).parts[0] in SLOW_FOLDERS and not item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude the modules and the thousands of collected tests, which all stay alive, from garbage collection."""
    freeze_collected(session.config)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Freeze the objects of modules that a test was the first to import.

    Every training run collects garbage twice, and each collection would take 0.3 s longer.
    """
    yield
    if len(sys.modules) - item.config.stash[MODULES_KEPT] >= MANY_MODULES:
        freeze_collected(item.config)


def freeze_collected(config: pytest.Config) -> None:
    gc.collect()
    # Not gc.freeze(), after which Triton would report its objects as leaked below pytest's last line.
    keep_imported(f"{len(sys.modules)} modules")
    config.stash[MODULES_KEPT] = len(sys.modules)


@pytest.fixture(autouse=True)
def _log_handlers() -> Iterator[None]:
    """Remove the log handlers that a command installed: their stream is closed when the test ends."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


tiny_sd_folder, tiny_sd_file = tiny_model("sd", 11), tiny_model("sd", 11, layout="safetensors")
tiny_sd2_folder, tiny_sd2_file = (
    tiny_model("sd", 21, layout=kind, is_v2=True) for kind in ("diffusers", "safetensors")
)
tiny_sdxl_folder, tiny_sdxl_file = tiny_model("sdxl", 31), tiny_model("sdxl", 31, layout="safetensors")
