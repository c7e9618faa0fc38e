"""--deterministic asks torch for kernels with one order of sums, for the run alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.training.models.cuda_kernels import WORKSPACE, deterministic
from tests.running import Finished


def test_torch_is_asked_while_it_is_wanted_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ[WORKSPACE] == ":4096:8"
        assert torch.is_deterministic_algorithms_warn_only_enabled() and not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


def test_memory_is_not_filled_before_it_is_used() -> None:
    """torch would write NaN into every new tensor."""
    with deterministic(True):
        kept = torch.zeros(1 << 16)
        address = kept.data_ptr()
        del kept
        again = [torch.empty(1 << 16) for _ in range(4)]
        assert not any(tensor.isnan().all() for tensor in again if tensor.data_ptr() == address)
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.slow
def test_a_run_asks_for_it(train: Callable[..., Finished], base_arguments: list[str], tmp_path: Path) -> None:
    done = train([*base_arguments, "--deterministic", "--max_train_steps", "1"])
    assert done.status == 0 and "--deterministic: deterministic kernels are used" in done.stderr
    assert not torch.are_deterministic_algorithms_enabled()
