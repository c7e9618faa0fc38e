"""Installed packages are checked against the required versions."""

from types import SimpleNamespace
from typing import Any

import pytest

from library.base.errors import UserError
from library.environment import installed
from library.environment.installed import check_gpu_is_used, check_installed, find_lack


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


def fake_torch(
    cuda: str | None,
    has_gpu: bool = False,
    capability: tuple[int, int] = (8, 9),
    architectures: tuple[str, ...] = ("sm_80",),
    gcn: str = "",
) -> SimpleNamespace:
    """Return a stand-in for torch with the attributes that are checked."""
    cuda_module = SimpleNamespace(
        is_available=lambda: has_gpu,
        device_count=lambda: int(has_gpu),
        get_arch_list=lambda: architectures,
        get_device_name=lambda number: "a GPU",
        get_device_capability=lambda number: capability,
        get_device_properties=lambda number: SimpleNamespace(gcnArchName=gcn),
    )
    version = SimpleNamespace(cuda=cuda, hip="7.0" if gcn else None)
    return SimpleNamespace(cuda=cuda_module, accelerator=cuda_module, version=version, __version__="2.9.0+cpu")


GPU = ["NVIDIA GeForce RTX 3060, 580.1, 12288 MiB"]


def test_training_on_the_cpu_despite_a_gpu_is_refused_unless_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(installed, "list_nvidia_gpus", lambda: [])
    check_gpu_is_used(fake_torch(None))
    monkeypatch.setattr(installed, "list_nvidia_gpus", lambda: GPU)
    monkeypatch.setattr(installed.torch_builds, "list_nvidia", lambda: [("RTX 3060", 8.6, 580)])
    check_gpu_is_used(fake_torch("13.0", has_gpu=True))
    with pytest.raises(
        UserError, match=r"RTX 3060, but .*torch 2.9.0\+cpu is a build without CUDA: .*setup --torch cu130.*--cpu"
    ):
        check_gpu_is_used(fake_torch(None))
    for gpu, fix in (
        (("RTX 4090", 8.9, 550), "run python3 tools/start.py setup --torch cu126"),
        (("GTX 1080", 6.1, 580), "run python3 tools/start.py setup --torch cu126"),
        (("GTX 1080", 6.1, 470), "run python3 tools/start.py setup --torch cu118"),
        (("RTX 5090", 12.0, 520), "RTX 5090 has driver 520, but torch needs 525 or newer: update the driver"),
        (("GTX 660", 3.0, 470), "no build of torch from 2.6 on has kernels for GTX 660"),
    ):
        monkeypatch.setattr(installed.torch_builds, "list_nvidia", lambda gpu=gpu: [gpu])
        with pytest.raises(UserError, match=f"requires CUDA 13.0: {fix}"):
            check_gpu_is_used(fake_torch("13.0"))
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_gpu_is_used(fake_torch(None))


@pytest.mark.parametrize(
    ("gpu", "fix"),
    [
        ({"capability": (8, 9)}, None),
        ({"capability": (6, 1)}, "setup --torch cu126"),
        ({"capability": (12, 0)}, "setup --torch cu130"),
        ({"capability": (3, 5)}, "no build of torch from 2.6 on has kernels for a GPU"),
        ({"gcn": "gfx1100", "architectures": ("gfx1100", "gfx942")}, None),
        ({"gcn": "gfx942:sramecc+:xnack-", "architectures": ("gfx942",)}, None),
        ({"gcn": "gfx1201", "architectures": ("gfx1100",)}, "setup --torch rocm7.1"),
    ],
)
def test_a_gpu_without_kernels_in_torch_ends_the_run_with_the_command(
    gpu: dict[str, Any], fix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed.torch_builds, "list_nvidia", lambda: [])
    if fix is None:
        check_gpu_is_used(fake_torch("13.0", True, **gpu))
        return
    with pytest.raises(UserError, match=f"^this run would train on a GPU, but torch .* has kernels only for .*{fix}"):
        check_gpu_is_used(fake_torch("13.0", True, **gpu))
