"""Fixtures that every suite shares."""

import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.collector import keep_imported
from tests.running import base_arguments, fresh_process, images, launch, train  # noqa: F401

SLOW_FOLDERS = ("made_up", "parity", "runs")
MANY_MODULES = 20
MODULES_KEPT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # before -m selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole training runs and comparisons of whole models as slow."""
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).parts[0] in SLOW_FOLDERS and not item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude the modules and the thousands of collected tests, which all stay alive, from garbage collection."""
    freeze_collected(session.config)


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


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x model as a diffusers folder; read-only."""
    from tests.tiny.sd import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("tiny_sd_folder"), seed=11)


@pytest.fixture(scope="session")
def tiny_sd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_sd_folder` as a single .safetensors file with tokenizer/ next to it; read-only."""
    from tests.tiny.sd import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("tiny_sd_file"), seed=11, layout="safetensors")


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 2.x model as a diffusers folder; read-only."""
    from tests.tiny.sd import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("tiny_sd2_folder"), seed=21, is_v2=True)


@pytest.fixture(scope="session")
def tiny_sd2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_sd2_folder` as a single .safetensors file with tokenizer/ next to it; read-only."""
    from tests.tiny.sd import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("tiny_sd2_file"), seed=21, layout="safetensors", is_v2=True)


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL model as a diffusers folder; read-only."""
    from tests.tiny.sdxl import build_tiny_sdxl

    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny_sdxl_folder"), seed=31)


@pytest.fixture(scope="session")
def tiny_sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_sdxl_folder` as a single .safetensors file with tokenizer/ next to it; read-only."""
    from tests.tiny.sdxl import build_tiny_sdxl

    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny_sdxl_file"), seed=31, layout="safetensors")
