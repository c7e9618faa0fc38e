"""Installed packages against the versions that are needed."""

from types import SimpleNamespace

import pytest

from library import installed
from library.errors import UserError
from library.installed import check_gpu_is_used, check_installed, find_lack


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"transformers": "4.54.1", "diffusers": "0.36.0.dev0"}
    monkeypatch.setattr(installed, "version_of", there.get)


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
def test_a_package_is_held_to_a_requirement(requirement: str, lack: str | None) -> None:
    found = find_lack(requirement)
    assert (None if found is None else str(found)) == lack


def test_all_packages_are_updated_together_where_one_is_too_old() -> None:
    check_installed("Knots 1", {"transformers": ">=4", "diffusers": ">=0.32"})
    with pytest.raises(UserError) as error:
        check_installed("Knots 1", {"transformers": ">=5", "diffusers": ">=0.32"})
    assert str(error.value) == (
        "The installed packages cannot train Knots 1: transformers 4.54.1 (required: >=5). "
        'Run python3 -m pip install -U "transformers>=5" "diffusers>=0.32"'
    )


def torch_of(cuda: str | None, has_gpu: bool = False) -> SimpleNamespace:
    """The parts of torch that are looked at."""
    found = SimpleNamespace(is_available=lambda: has_gpu)
    return SimpleNamespace(cuda=found, accelerator=found, version=SimpleNamespace(cuda=cuda), __version__="2.9.0+cpu")


GPU = ["NVIDIA GeForce RTX 3060, 580.1, 12288 MiB"]


def test_training_on_the_cpu_beside_a_gpu_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(installed, "list_nvidia_gpus", lambda: [])
    check_gpu_is_used(torch_of(None))
    monkeypatch.setattr(installed, "list_nvidia_gpus", lambda: GPU)
    check_gpu_is_used(torch_of("13.0", has_gpu=True))
    with pytest.raises(UserError, match=r"RTX 3060, but .*torch 2.9.0\+cpu is a build without CUDA.*--cpu"):
        check_gpu_is_used(torch_of(None))
    with pytest.raises(UserError, match=r"torch requires CUDA 13\.0: update the driver"):
        check_gpu_is_used(torch_of("13.0"))
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_gpu_is_used(torch_of(None))
