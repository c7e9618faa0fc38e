"""Checks of installed packages against required versions."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.base.errors import UserError
from library.environment import torch_builds
from library.environment.packages import version_of

# Lower than in requirements.txt, because front ends pin their own versions and most base models train with these.
NEEDED_BY_ALL: Mapping[str, str] = {"transformers": ">=4.53", "diffusers": ">=0.32"}


@dataclass(frozen=True)
class Lack:
    """A required package that is missing or has the wrong version."""

    package: str
    found: str | None  # installed version; None if missing
    needed: str  # ">=0.38"

    def __str__(self) -> str:
        return "missing" if self.found is None else f"{self.found} (required: {self.needed})"


def find_lack(requirement: str) -> Lack | None:
    """Check a requirement such as "torch>=2.9". Return None if it is met or does not apply to this Python."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate():
        return None
    installed = version_of(parsed.name)
    # Nightly builds are pre-releases, which a specifier excludes by default.
    if installed is not None and parsed.specifier.contains(installed, prereleases=True):
        return None
    return Lack(parsed.name, installed, str(parsed.specifier))


GET_TORCH = "reinstall it with `python3 tools/start.py setup`"
SETUP_TORCH = "python3 tools/start.py setup --torch"


def list_nvidia_gpus() -> list[str]:
    """Return "name, driver version, memory" of each GPU that nvidia-smi lists; empty without a driver."""
    # nvidia-smi finds the GPU that a CPU build of torch does not see.
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return [line.strip() for line in torch_builds.read(command).splitlines() if line.strip()]


def explain_unused_gpu(torch: Any, gpus: Iterable[str]) -> str | None:
    """Explain why torch cannot use the GPUs of the driver, and the fix. Return None if it can, or if there are none."""
    if not list(gpus) or torch.cuda.is_available():
        return None
    found = f"requires CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
    return f"torch {torch.__version__} {found}: {suggest_cuda_build(torch_builds.list_nvidia())}"


def architecture_of(torch: Any, number: int) -> str:
    """Return a GPU's architecture as `torch.cuda.get_arch_list` names it: sm_89, gfx1100."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(number).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(number))


def has_kernels(architecture: str, known: Sequence[str]) -> bool:
    """Return True if kernels for one of `known` run on `architecture`: the same generation and not newer, or PTX."""
    if not known or architecture in known or architecture.startswith("gfx"):
        return not known or architecture in known
    number = int(architecture.removeprefix("sm_"))
    for name in known:
        digits = "".join(c for c in name if c.isdigit())
        # sm_ names machine code; compute_ names PTX, which the driver compiles for newer GPUs.
        exact = name.startswith("sm_") and int(digits) // 10 == number // 10 and int(digits) <= number
        if exact or (name.startswith("compute_") and int(digits) <= number):
            return True
    return False


def explain_missing_kernels(torch: Any, number: int) -> str | None:
    """Explain that this build of torch has no kernels for a GPU, and the fix. Return None if it has."""
    known = torch.cuda.get_arch_list()
    architecture = architecture_of(torch, number)
    if has_kernels(architecture, known):
        return None
    return f"torch {torch.__version__} has kernels only for {', '.join(known)}: {suggest_build(torch, number)}"


def suggest_build(torch: Any, number: int) -> str:
    """Return the command that installs a build of torch with kernels for a GPU, or why there is none."""
    if torch.version.hip:
        has_build = architecture_of(torch, number) in torch_builds.ROCM_TARGETS
        return f"run {SETUP_TORCH} {torch_builds.ROCM_TAG if has_build else 'cpu'}"
    name, (major, minor) = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
    driver = max((gpu[2] for gpu in torch_builds.list_nvidia()), default=torch_builds.CUDA_BUILDS[0].driver)
    return suggest_cuda_build([(name, float(f"{major}.{minor}"), driver)])


def suggest_cuda_build(gpus: "list[tuple[str, float, int]]") -> str:
    """Return the command that installs a build of torch for the newest of the NVIDIA GPUs, or why there is none.

    `gpus` are (name, compute capability, driver), as `setup` chooses by them.
    """
    if not gpus:
        return f"run {SETUP_TORCH} and the build for the GPU, such as {torch_builds.CUDA_BUILDS[0].tag}"
    try:
        choice = torch_builds.choose_cuda(gpus)
    except torch_builds.NoBuild as error:
        return str(error)
    return f"run {SETUP_TORCH} {str(choice.index).removeprefix(torch_builds.INDEX)}"


def check_gpu_is_used(torch: Any) -> None:
    """Raise UserError if training would run on the CPU although the machine has an NVIDIA GPU, or on a GPU that torch
    has no kernels for. An explicit choice of the CPU is accepted."""
    is_cpu_requested = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if is_cpu_requested or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    number = int(os.environ.get("LOCAL_RANK", 0))
    is_there = torch.cuda.is_available() and number < torch.cuda.device_count()
    if is_there and (reason := explain_missing_kernels(torch, number)):
        raise UserError(f"this run would train on {torch.cuda.get_device_name(number)}, but {reason}")
    if torch.accelerator.is_available():
        return
    gpus = list_nvidia_gpus()
    if reason := explain_unused_gpu(torch, gpus):
        raise UserError(
            f"this machine has {gpus[0].partition(',')[0]}, but training would run on the CPU, a hundred times slower: "
            f"{reason}. To train on the CPU anyway, use `accelerate launch --cpu`"
        )


def install_command(requirements: Iterable[str]) -> str:
    return "python3 -m pip install -U " + " ".join(f'"{requirement}"' for requirement in requirements)


def check_installed(what: str, needed: Mapping[str, str]) -> None:
    """Raise UserError with a pip command if a package that training `what` needs is missing or has the wrong version.

    `needed` maps packages to version specifiers.
    """
    requirements = [package + specifier for package, specifier in needed.items()]
    lacks = [lack for requirement in requirements if (lack := find_lack(requirement)) is not None]
    if lacks:
        listed = "; ".join(f"{lack.package} {lack}" for lack in lacks)
        raise UserError(f"The installed packages cannot train {what}: {listed}. Run {install_command(requirements)}")
