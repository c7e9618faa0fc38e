"""Build of the extension, once per source and torch version, in a cache folder of the user.

`python -m tests.simulated_gpu.build FOLDER` compiles it there; `extension()` does so in a subprocess.
"""

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

NAME = "simulated_gpu"
SOURCE = Path(__file__).with_name("simulated_gpu.cpp")
ROOT = Path(__file__).parents[2]
FLAGS = ["-O1", "-g0", "-w", "-std=c++20"]
OLDEST_TORCH = (2, 9)


def obstacle() -> str | None:
    """Return why no GPU can be simulated here, or None if one can."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return f"torch {torch.__version__} is a build for GPUs"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than 2.9"
    if sys.platform != "linux":
        return "it needs Linux"
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler ({compiler()})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no headers of Python, which Debian and Ubuntu have in python3-dev"
    return None


def compiler() -> str:
    """Return the name of the C++ compiler that setuptools calls for torch's cpp_extension."""
    return (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]


def extension() -> ModuleType:
    """Return the extension, building it if it is not cached.

    Concurrent builds wait for each other. Raises RuntimeError with the compiler's errors.
    """
    folder = cache_folder() / digest()
    file = folder / f"{NAME}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not file.exists():
                build_apart(folder / "unfinished")
                os.replace(folder / "unfinished" / file.name, file)
                shutil.rmtree(folder / "unfinished")
    return load(file)


def cache_folder() -> Path:
    """Return the folder that keeps builds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-tests" / NAME


def digest() -> str:
    """Return a digest of everything a build depends on, as a folder name."""
    parts = (SOURCE.read_text(encoding="utf-8"), torch.__version__, sys.version, platform.machine(), compiler(), *FLAGS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build_apart(folder: Path) -> None:
    """Compile in a subprocess, as setuptools writes to standard output and changes process settings."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, "-m", "tests.simulated_gpu.build", str(folder)]
    # With startup/ on its path it would simulate a GPU itself, and wait for the lock of this build for ever.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        shown = [line for line in lines if " error: " in line] or lines
        raise RuntimeError("building the simulated GPU failed:\n" + "\n".join(shown[-20:]))


def build(folder: Path) -> None:
    """Compile into a folder, with torch's cpp_extension."""
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    parts = {"name": NAME, "ext_modules": [CppExtension(NAME, [str(SOURCE)], extra_compile_args=FLAGS)]}
    command = BuildExtension.with_options(use_ninja=False, no_python_abi_suffix=True)(Distribution(parts))
    command.build_lib = command.build_temp = str(folder)
    command.ensure_finalized()
    command.run()


def load(file: Path) -> ModuleType:
    """Import an extension from its file."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(file))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    build(Path(sys.argv[1]))
