"""Installed packages are checked against the required versions."""

from types import SimpleNamespace

import pytest

from library import installed
from library.errors import UserError
from library.installed import check_gpu_is_used, check_installed, find_lack


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions_found = {"transformers": "4.54.1", "diffusers": "0.36.0.dev0"}
    monkeypatch.setattr(installed, "version_of", versions_found.get)


@pytest.mark.parametrize(
    ("requirement", "lack"),
    [
        ("transformers>=4.54", None),
        ("transformers>=5", "4.54.1 (required: >=5)"),
        ("diffusers>=0.35", None),
        ("none-such>=1", "missing"),
        ('none-such>=1; python_version < "3"', None),
    ],
)
def test_a_package_that_does_not_meet_a_requirement_is_reported(requirement: str, lack: str | None) -> None:
    problem = find_lack(requirement)
    assert (None if problem is None else str(problem)) == lack


def test_the_error_updates_all_packages_together_if_one_is_too_old() -> None:
    check_installed("Knots 1", {"transformers": ">=4", "diffusers": ">=0.32"})
    with pytest.raises(UserError) as error:
        check_installed("Knots 1", {"transformers": ">=5", "diffusers": ">=0.32"})
    assert str(error.value) == (
        "The installed packages cannot train Knots 1: transformers 4.54.1 (required: >=5). "
        'Run python3 -m pip install -U "transformers>=5" "diffusers>=0.32"'
    )


def fake_torch(cuda: str | None, has_gpu: bool = False) -> SimpleNamespace:
    """Return a stand-in for torch with the attributes that are checked."""
    cuda_module = SimpleNamespace(is_available=lambda: has_gpu)
    return SimpleNamespace(
        cuda=cuda_module, accelerator=cuda_module, version=SimpleNamespace(cuda=cuda), __version__="2.9.0+cpu"
    )


GPU = ["NVIDIA GeForce RTX 3060, 580.1, 12288 MiB"]


def test_training_on_the_cpu_despite_a_gpu_is_refused_unless_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(installed, "list_nvidia_gpus", lambda: [])
    check_gpu_is_used(fake_torch(None))
    monkeypatch.setattr(installed, "list_nvidia_gpus", lambda: GPU)
    check_gpu_is_used(fake_torch("13.0", has_gpu=True))
    with pytest.raises(UserError, match=r"RTX 3060, but .*torch 2.9.0\+cpu is a build without CUDA.*--cpu"):
        check_gpu_is_used(fake_torch(None))
    with pytest.raises(UserError, match=r"torch requires CUDA 13\.0: update the driver"):
        check_gpu_is_used(fake_torch("13.0"))
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_gpu_is_used(fake_torch(None))
