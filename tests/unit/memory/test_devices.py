"""Memory layout of models, and memory that is released between the stages of a run."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.memory.devices import is_on, make_input_contiguous, release_memory
from tests.running import ROOT

BACKENDS = {"cuda": "torch.cuda", "mps": "torch.mps"}


def test_a_device_without_an_index_matches_any_index() -> None:
    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(2, device="cuda:0"), torch.empty(2)
    assert is_on(on_gpu, torch.device("cuda")) and is_on(on_gpu, torch.device("cuda", 0))
    assert not is_on(on_gpu, torch.device("cuda", 1)) and not is_on(on_gpu, torch.device("cpu"))
    assert is_on(on_cpu, torch.device("cpu")) and not is_on(on_cpu, torch.device("cuda"))


@pytest.mark.parametrize("available", [*BACKENDS, None])
def test_the_cache_of_the_available_backend_is_emptied(monkeypatch: pytest.MonkeyPatch, available: str | None) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available == "mps")
    for name, module in BACKENDS.items():
        monkeypatch.setattr(f"{module}.empty_cache", lambda name=name: emptied.append(name))
    release_memory(keep_cache=True)
    assert emptied == []
    release_memory()
    assert emptied == ([available] if available else [])


CRASH = """
import sys, torch
from torch import nn
from library.memory.devices import move_to_device
layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3))
layers.requires_grad_(False)
move_to_device(move_to_device(layers, torch.device("cpu")), torch.device("cpu"))
assert len(layers[1]._forward_pre_hooks) == 1
layers[1].weight.requires_grad_(True)
layers(torch.randn(2, 4, 8, 8)).square().sum().backward()
print(float(layers[1].weight.grad.abs().sum()) > 0)
"""


@pytest.mark.slow
def test_a_group_norm_of_a_frozen_model_can_be_trained_on_the_cpu() -> None:
    """Runs in a process of its own, because torch could crash with a segmentation fault."""
    done = subprocess.run([sys.executable, "-c", CRASH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_only_an_input_without_a_gradient_changes_its_layout() -> None:
    norm = nn.GroupNorm(2, 8)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    (changed,) = make_input_contiguous(norm, (x,)) or ()
    assert changed.is_contiguous() and torch.equal(changed, x)
    assert make_input_contiguous(norm, (x.clone().requires_grad_(),)) is None
    assert make_input_contiguous(norm, (x.contiguous(),)) is None
    with torch.no_grad():
        assert make_input_contiguous(norm, (x,)) is None
