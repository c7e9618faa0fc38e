"""--deterministic: torch's strict mode, errors that name the operation and its module, and what is refused."""

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from library.base.determinism import (
    WORKSPACES,
    NotDeterministicError,
    deterministic,
    deterministic_mode,
    explain_nondeterminism,
)
from library.base.errors import UserError
from library.models.unet_loader import should_use_xformers
from library.options.machine.memory import MemoryOptions
from library.options.training.optimizer import OptimizerOptions
from library.training.failures.nondeterministic import Position, follow_modules
from library.training.optimization.optimizers import build_optimizer
from tests.running import Finished


@pytest.fixture(autouse=True)
def no_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACES, "")  # so that the run's value is removed at the end
    monkeypatch.delenv(WORKSPACES)


def test_strict_mode_is_on_inside_the_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    attention = torch.backends.cuda
    before = (attention.cudnn_sdp_enabled(), attention.flash_sdp_enabled())
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and WORKSPACES not in os.environ
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ[WORKSPACES] == ":4096:8"
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention adds in any order with warnings"
        assert not torch.backends.cudnn.benchmark
        assert not attention.cudnn_sdp_enabled() and attention.flash_sdp_enabled()
        with deterministic_mode(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert (attention.cudnn_sdp_enabled(), attention.flash_sdp_enabled()) == before


def test_rocm_computes_attention_by_the_math_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    attention = torch.backends.cuda
    with deterministic(True):
        assert not attention.flash_sdp_enabled() and not attention.mem_efficient_sdp_enabled()
        assert attention.math_sdp_enabled()
    assert attention.flash_sdp_enabled() and attention.mem_efficient_sdp_enabled()


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


@pytest.mark.parametrize("value", [":4096:8", ":16:8"])
def test_a_workspace_configuration_with_a_fixed_order_is_kept(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACES, value)
    with deterministic(True):
        assert os.environ[WORKSPACES] == value


def test_another_workspace_configuration_is_refused_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACES, ":0:0")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0', .* unset it, or set it to"):
        with deterministic(True):
            pass
    assert os.environ[WORKSPACES] == ":0:0" and not torch.are_deterministic_algorithms_enabled()


def test_xformers_is_refused_where_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Front ends set --xformers by default, also where it is not installed."""
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert not should_use_xformers(MemoryOptions(xformers=True), is_deterministic=True)
    installed = ModuleType("xformers")
    installed.__spec__ = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers", installed)
    assert should_use_xformers(MemoryOptions(xformers=True), is_deterministic=False)
    with pytest.raises(UserError, match=r"--deterministic excludes --xformers, .* leave --xformers out"):
        should_use_xformers(MemoryOptions(xformers=True), is_deterministic=True)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "is_refused"),
    [
        ("AdamW8bit", None, False),
        ("bitsandbytes.optim.LAMB", None, True),
        ("bitsandbytes.optim.LARS8bit", ["momentum=0.9"], True),
        ("Lion8bit", None, False),
    ],
)
def test_optimizers_whose_kernels_add_norms_in_any_order_are_refused(
    optimizer: str, arguments: list[str] | None, is_refused: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    options = OptimizerOptions(optimizer_type=optimizer, optimizer_args=arguments)
    groups = [{"params": [nn.Parameter(torch.ones(8, 8))], "lr": 1e-3}]
    build_optimizer(options, groups)
    with deterministic_mode(True):
        if not is_refused:
            build_optimizer(options, groups)
            return
        with pytest.raises(UserError, match=rf"--deterministic excludes --optimizer_type {optimizer} with max_unorm"):
            build_optimizer(options, groups)


class PutInBackward(torch.autograd.Function):
    """The identity, whose backward pass uses an operation that has no deterministic form, on the CPU either."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.zeros_like(gradient).put_(torch.arange(gradient.numel()), gradient.flatten())


class Put(nn.Module):
    def __init__(self, in_backward: bool) -> None:
        super().__init__()
        self.in_backward = in_backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_backward:
            return torch.ops.aten.mul(PutInBackward.apply(x), 2)
        return x.put(torch.tensor([0]), torch.ones(1))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_module_with_the_operation_is_found(in_backward: bool, recomputes: bool) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), Put(in_backward), nn.Linear(4, 4))
    model, position = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 4)), Position()
    x = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="deterministic"), deterministic_mode(True):
        with follow_modules({"denoiser": model}, position):
            x = model[0](x)
            x = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False) if recomputes else inner(x)
            model[2](x).sum().backward()
    assert position.module == "denoiser.1.1"


def test_an_error_outside_of_a_step_names_the_class_in_its_traceback() -> None:
    with pytest.raises(NotDeterministicError, match=r"the operation put_ in Put has no deterministic form in torch"):
        with deterministic_mode(True), explain_nondeterminism():
            nn.Sequential(nn.Identity(), Put(in_backward=False))(torch.ones(4))
    with pytest.raises(RuntimeError, match="shapes"), explain_nondeterminism():
        torch.ones(2, 3) @ torch.ones(2, 3)


NETWORK = """
import torch
from networks import lora

class Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient).put_(torch.arange(gradient.numel()), gradient.flatten())

calls = 0
def change(module, inputs, output):
    global calls
    calls += 1
    return Put.apply(output) if calls > 2 else output  # from the third step on

def create_network(multiplier, dim, alpha, vae, encoders, unet, **named):
    unet.get_submodule(CHANGED).register_forward_hook(change)
    return lora.create_network(multiplier, dim, alpha, vae, encoders, unet, **named)
"""
CHANGED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.slow
def test_the_first_step_with_such_an_operation_ends_the_run_before_anything_is_saved(
    train: Callable[..., Finished], base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net_of_a_user.py").write_text(f"CHANGED = {CHANGED!r}\n{NETWORK}")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [*base_arguments, "--network_module", "net_of_a_user", "--no_report"]
    done = train([*arguments, "--deterministic", "--save_state"])
    assert done.status == 1 and "Traceback" not in done.stderr
    named = f"--deterministic: the operation put_ in denoiser.{CHANGED} has no deterministic form in torch"
    assert named in done.stderr and "Leave out --deterministic, or the option or network module" in done.stderr
    assert "deterministic kernels are used" in done.stderr and not torch.are_deterministic_algorithms_enabled()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix != ".lock"]
