"""Resuming and --deterministic on GPUs whose attention adds in any order, which the simulation's noise stands for."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention

from library.base.determinism import deterministic_mode
from tests.runs.test_verify import arguments_for
from tests.simulated_gpu.device import Simulation
from tools import verify

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]
GPU = torch.device("cuda")
IDENTICAL = r"ok    resumed from step 10    identical \(\d+ tensors\)"
STARTUP = Path(__file__).parent / "startup"


def query_gradient() -> torch.Tensor:
    """Return dQ of a fixed attention call, as bits that the host has read."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 16, 8, generator=generator).to(GPU, torch.bfloat16) for _ in range(3))
    q.requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(q, k, v).float().square().sum().backward()
    assert q.grad is not None
    return q.grad.cpu()


def test_atomics_change_the_query_gradient_outside_of_strict_mode_only(simulated_gpu: Simulation) -> None:
    assert torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention
    with simulated_gpu.configured(has_atomics=False):
        exact = query_gradient()
    with simulated_gpu.configured(has_atomics=True):
        noisy = query_gradient()
        with deterministic_mode(True):
            assert torch.equal(query_gradient(), exact)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert not torch.equal(query_gradient(), exact), "a warning leaves the atomic adds"
        finally:
            torch.use_deterministic_algorithms(False)
    assert not torch.equal(noisy, exact) and torch.allclose(noisy.float(), exact.float(), rtol=0.02)


def test_operations_without_a_deterministic_form_raise_in_strict_mode() -> None:
    x = torch.ones(1, 1, 4, 4, device=GPU, requires_grad=True)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    with deterministic_mode(True):
        torch.ones(4, device=GPU, dtype=torch.int64).cumsum(0)
        with pytest.raises(RuntimeError, match="cumsum does not have a deterministic implementation"):
            torch.ones(4, device=GPU).cumsum(0)
        with pytest.raises(RuntimeError, match="reflection_pad2d_backward does not have a deterministic"):
            padded.sum().backward()


Verify = Callable[..., str]


@pytest.fixture
def verified(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verify:
    """Return `verified(atomics, ...)`, which runs verify.py and its trainings, and returns the line about resuming."""
    monkeypatch.setenv("PYTHONPATH", str(STARTUP))

    def run(has_atomics: bool, *options: str) -> str:
        monkeypatch.setenv("SIMULATED_ATOMICS", str(int(has_atomics)))
        verify.main(arguments_for("flux", tmp_path, "--mixed_precision", "bf16", *options))
        output = capfd.readouterr()
        (line,) = set(re.findall(r"^.*resum.*$", output.out, re.MULTILINE))
        return line

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize(
    ("has_atomics", "options", "expected"),
    [
        (True, [], r"ok    resumed from step 10    \d+ of \d+ tensors differ, by .*: rounding of GPU kernels"),
        (True, ["--deterministic"], IDENTICAL),
        pytest.param(False, [], IDENTICAL, marks=pytest.mark.nightly),
        pytest.param(False, ["--deterministic"], IDENTICAL, marks=pytest.mark.nightly),
    ],
)
def test_verify_judges_resuming_by_the_spread_of_continued_runs(
    verified: Verify, has_atomics: bool, options: list[str], expected: str
) -> None:
    assert re.match(expected, verified(has_atomics, *options))


@pytest.mark.nightly
@pytest.mark.usefixtures("fresh_process")
def test_a_resumed_run_that_differs_by_more_than_noise_is_wrong(
    verified: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both continued runs lack one step's worth of training."""
    train = verify.Trial.train

    def train_and_spoil(self: verify.Trial) -> "subprocess.CompletedProcess[str]":
        done = train(self)
        if self.folder.name != "whole":
            tensors = load_file(self.adapter)
            save_file({name: 0.95 * tensor for name, tensor in tensors.items()}, self.adapter)
        return done

    monkeypatch.setattr(verify.Trial, "train", train_and_spoil)
    assert re.match(r"WRONG resumed from step 10 .* more than rounding explains", verified(True))
