"""Which build of torch has kernels for this machine's GPU.

The facts are those of PyTorch's release notes and support matrix (RELEASE.md of its repository). An old Python must be
able to parse this file, so annotations are quoted.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

INDEX = "https://download.pytorch.org/whl/"
SECONDS = 20  # for a driver's tool to answer


class NoBuild(Exception):
    """No build has kernels for the GPU; the message says why, and what to do."""


class CudaBuild:
    """A CUDA build: the compute capabilities that it has kernels for, the driver that it needs, its torch versions."""

    def __init__(self, tag: str, capabilities: "tuple[float, float]", driver: int, versions: str) -> None:
        self.tag, self.capabilities, self.driver, self.versions = tag, capabilities, driver, versions

    def has(self, capability: float) -> bool:
        return self.capabilities[0] <= capability <= self.capabilities[1]


# The newest torch first. A driver of 525 runs all of CUDA 12, one of 580 all of CUDA 13.
CUDA_BUILDS = (
    CudaBuild("cu130", (7.5, 12.1), 580, "torch>=2.9"),
    CudaBuild("cu126", (5.0, 9.0), 525, "torch>=2.6,<2.15"),
    CudaBuild("cu128", (7.5, 12.1), 525, "torch>=2.7,<2.11"),
    CudaBuild("cu118", (5.0, 9.0), 450, "torch>=2.6,<2.8"),
)
ROCM_TAG, ROCM_VERSIONS = "rocm7.1", "torch>=2.10"
ROCM_TARGETS = (
    "gfx900", "gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1150",
    "gfx1151", "gfx1200", "gfx1201",
)  # fmt: skip


SERIES = (
    (r"GTX 9\d\d", 5.2), (r"P100", 6.0), (r"GTX 10\d\d|P40|P4\b", 6.1), (r"V100", 7.0),
    (r"(GTX 16|RTX 20)\d\d|T4", 7.5),
    (r"A100", 8.0), (r"RTX 30\d\d|A40|RTX A\d000", 8.6), (r"RTX 40\d\d|L40|L4\b", 8.9), (r"H100|H200", 9.0),
)  # fmt: skip


class TorchBuild:
    """A build to install: the index (None: PyPI's), the requirement for torch, and the reason for the user."""

    def __init__(self, index: "str | None", requirement: str, reason: str) -> None:
        self.index, self.requirement, self.reason = index, requirement, reason


def read(command: "list[str]") -> str:
    """Return what a driver's tool prints; "" if it is missing or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def list_nvidia() -> "list[tuple[str, float, int]]":
    """Return (name, compute capability, major version of the driver) of each NVIDIA GPU.

    The capability is 0 if the driver is too old to know it (before 510) and the name does not tell it.
    """
    query = "nvidia-smi --format=csv,noheader --query-gpu=name,{}driver_version"
    printed = read(query.format("compute_cap,").split()) or read(query.format("").split())
    rows = [re.split(r"\s*,\s*", line.strip()) for line in printed.splitlines()]
    return [
        (row[0], capability_of(*row[:-1]), int(row[-1].split(".")[0]))
        for row in rows
        if len(row) in (2, 3) and re.match(r"\d+\.", row[-1])
    ]


def capability_of(name: str, queried: str = "") -> float:
    """Return a GPU's compute capability as the driver knows it, or by the series in its name; 0 if neither does."""
    if re.match(r"\d+\.\d+$", queried):
        return float(queried)
    return next((capability for series, capability in SERIES if re.search(series, name)), 0.0)


def list_compiler_needs() -> "list[str]":
    """Return what compiled operations need and this machine lacks: a C compiler and Python's headers on Linux, Triton
    on Windows, where torch does not bring it."""
    if sys.platform == "win32":
        return [] if importlib.util.find_spec("triton") else ["triton-windows"]
    if sys.platform != "linux":
        return []
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return ([] if has_compiler else ["gcc"]) + ([] if has_headers else ["python3-dev"])


def describe_compiler_needs(python: Path) -> str:
    """Say what fused operations and --compile still need in an environment, with an NVIDIA GPU; "" if nothing."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from library.environment import torch_builds as b; "
    needs = read([str(python), "-c", code + "print(*b.list_compiler_needs())", str(Path(__file__).parents[2])]).split()
    if not needs or not list_nvidia():
        return ""
    where = "docs/windows.md says which version" if "triton-windows" in needs else "with your system's packages"
    return f"fused operations and --compile need {' and '.join(needs)}: install them ({where})"


def list_amd() -> "list[str]":
    """Return the targets ("gfx1100") of AMD's GPUs, as the Linux driver lists them."""
    targets = []
    for path in sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        match = re.search(r"^gfx_target_version (\d+)$", path.read_text(), re.MULTILINE)
        number = int(match.group(1)) if match else 0  # 110001 is gfx1101; processors have 0
        if number:
            targets.append(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return targets


def choose_cuda(gpus: "list[tuple[str, float, int]]") -> TorchBuild:
    """Return the build with the newest torch for the newest GPU. Raises NoBuild if there is none."""
    name, capability, driver = max(gpus, key=lambda gpu: gpu[1])
    if not capability:
        raise NoBuild(f"driver {driver} does not tell the compute capability of {name}: update it, then run this again")
    builds = [build for build in CUDA_BUILDS if build.has(capability)]
    if not builds:
        raise NoBuild(
            f"no build of torch from 2.6 on has kernels for {name} (compute capability {capability}); to train on the "
            "processor, use --torch cpu"
        )
    fitting = [build for build in builds if build.driver <= driver]
    if not fitting:
        least = min(build.driver for build in builds)
        raise NoBuild(
            f"{name} has driver {driver}, but torch needs {least} or newer: update the driver, then run this again"
        )
    build = fitting[0]
    reason = f"{name} (compute capability {capability}, driver {driver})"
    return TorchBuild(INDEX + build.tag, build.versions, reason)


def is_reachable(index: str) -> bool:
    """Return True if an index of wheels answers."""
    try:
        with urllib.request.urlopen(index + "/torch/", timeout=SECONDS):
            return True
    except OSError:
        return False


def choose() -> TorchBuild:
    """Return the build for this machine. Raises NoBuild if its GPU has none."""
    gpus = list_nvidia()
    if gpus:
        return choose_cuda(gpus)
    if sys.platform == "darwin":
        return TorchBuild(None, "torch>=2.6", "Apple's processor" if platform.machine() == "arm64" else "no GPU")
    targets = list_amd() if sys.platform == "linux" else []
    usable = [target for target in targets if target in ROCM_TARGETS]
    if usable:
        return TorchBuild(INDEX + ROCM_TAG, ROCM_VERSIONS, f"AMD GPU {usable[0]}")
    if read(["xpu-smi", "discovery"]):
        return TorchBuild(INDEX + "xpu", "torch>=2.8", "Intel GPU")
    none = f"AMD GPU {targets[0]} without kernels in torch" if targets else "no GPU"
    return TorchBuild(INDEX + "cpu" if sys.platform == "linux" else None, "torch>=2.6", none)


def describe_build() -> str:
    """Say which build this machine's GPU needs, or why there is none; "" where any build will do."""
    try:
        choice = choose()
    except NoBuild as error:
        return str(error)
    tag = (choice.index or "").replace(INDEX, "")
    return (
        ""
        if tag in ("", "cpu")
        else f"{choice.reason}: a torch without its kernels is replaced by `setup --torch {tag}`"
    )


def named(tag: str) -> TorchBuild:
    """Return the build of a tag that the user gives, such as cpu, cu126, rocm6.4 or xpu."""
    versions = {build.tag: build.versions for build in CUDA_BUILDS}
    return TorchBuild(INDEX + tag, versions.get(tag, "torch>=2.6"), f"--torch {tag}")
