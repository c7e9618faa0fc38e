"""--deterministic makes torch use deterministic kernels for the duration of the run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.training.models.cuda_kernels import WORKSPACE, deterministic
from tests.running import Finished


def test_deterministic_algorithms_are_enabled_inside_the_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """In deterministic mode torch would by default fill every new tensor with NaN."""
    with deterministic(True):
        zeros = torch.zeros(1 << 16)
        address = zeros.data_ptr()
        del zeros
        reallocated = [torch.empty(1 << 16) for _ in range(4)]
        assert not any(tensor.isnan().all() for tensor in reallocated if tensor.data_ptr() == address)
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.slow
def test_a_run_enables_deterministic_algorithms(
    train: Callable[..., Finished], base_arguments: list[str], tmp_path: Path
) -> None:
    done = train([*base_arguments, "--deterministic", "--max_train_steps", "1"])
    assert done.status == 0 and "--deterministic: deterministic kernels are used" in done.stderr
    assert not torch.are_deterministic_algorithms_enabled()
