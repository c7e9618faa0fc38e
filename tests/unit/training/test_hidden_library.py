"""bitsandbytes is out of the way of runs that do not use it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.training.optimization.hidden_library import NAME, hidden_bitsandbytes, show_bitsandbytes

ROOT = Path(__file__).parents[3]


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


ERRORS = [
    "RuntimeError('CUDA setup failed')",
    pytest.param("OSError('libcudart.so')", marks=pytest.mark.slow),
    pytest.param("ImportError('x')", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("error", ERRORS)
def test_one_that_fails_to_import_does_not_end_a_run(base_arguments: list[str], tmp_path: Path, error: str) -> None:
    (tmp_path / "broken" / NAME).mkdir(parents=True)
    (tmp_path / "broken" / NAME / "__init__.py").write_text(f"raise {error}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}
    command = [sys.executable, str(ROOT / "train_network.py"), *base_arguments, "--max_train_steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine.safetensors").is_file()
