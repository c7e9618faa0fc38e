"""Missing, broken and hidden packages, temporary folders of killed processes, and the garbage collector's pause."""

import gc
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from library.base.collector import freeze_imports, keep_imported, pause_collection
from library.base.errors import UserError
from library.base.temporary_folders import delete_abandoned_folders, make_temporary_folder
from library.environment import installed
from library.environment.hidden_libraries import BITSANDBYTES, hide_library, unhide_library
from library.environment.installed import check_gpu_is_used, check_installed, find_lack
from library.environment.packages import describe_fault
from library.environment.requirements import show_uncaught
from tests.running import ROOT


def error_of(action: Callable[[], Any]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that imports another one, which raises, and hides the error as transformers does."""
    for name, code in {
        "outer_package": "try:\n    import inner_package\nexcept Exception as e:\n    raise RuntimeError() from e",
        "inner_package": "def check():\n    raise OSError('libx.so: wrong ELF class')\ncheck()",
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
        (tmp_path / f"{name}-2.0.dist-info").mkdir()
        (tmp_path / f"{name}-2.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 2.0\n")
        (tmp_path / f"{name}-2.0.dist-info" / "top_level.txt").write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "outer_package"


def test_the_package_whose_code_failed_is_named_and_not_those_that_import_it(broken: str) -> None:
    assert describe_fault(error_of(lambda: importlib.import_module(broken))) == (
        "inner-package 2.0 cannot be imported (OSError: libx.so: wrong ELF class); install another version: "
        "pip install --upgrade inner-package"
    )


def test_a_package_that_is_missing_below_others_is_named() -> None:
    def fail() -> None:
        try:
            importlib.import_module("a_package_nobody_has.models")
        except ImportError as error:
            raise RuntimeError("Failed to import transformers.models.x") from error

    said = "this needs the package a-package-nobody-has, which is not installed: pip install a-package-nobody-has"
    assert describe_fault(error_of(fail)) == said


@pytest.mark.parametrize(
    "error", [ValueError("x"), ImportError("cannot import name 'x'"), ModuleNotFoundError("x", name="library.x")]
)
def test_other_errors_are_no_fault_of_a_package(error: Exception) -> None:
    def fail() -> None:
        raise error

    assert describe_fault(error_of(fail)) is None


def test_uncaught_errors_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(lambda: int("\x1b[31mred\u202e"))
    show_uncaught("", type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "\\x1b[31mred\\u202e" in printed and "\x1b" not in printed


def test_an_uncaught_error_of_a_broken_package_is_one_line(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(lambda: importlib.import_module(broken))
    show_uncaught("", type(error), error, error.__traceback__)
    assert capsys.readouterr().err.startswith("error: inner-package 2.0 cannot be imported (OSError: libx.so")


def test_an_error_of_a_command_shows_the_names_of_its_arguments_escaped(tmp_path: Path) -> None:
    """Run a script of the suite that fails, since what is uncaught ends a process."""
    script = ROOT / "tools" / "show_metadata.py"
    code = f"""
import runpy, sys
sys.argv = ["show_metadata.py", "\\x1b[31m"]
sys.modules["__main__"].__file__ = {str(script)!r}
sys.path.insert(0, {str(ROOT)!r})
import library
raise RuntimeError(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: \\x1b[31m" in done.stderr and "\x1b" not in done.stderr


# Temporary folders of killed processes are deleted by a later run, those of running processes are not.

WAITS = """
import sys
from library.base.temporary_folders import make_temporary_folder
print(make_temporary_folder("latents", sys.argv[1]), flush=True)
sys.stdin.read()
"""


def start(parent: Path) -> tuple["subprocess.Popen[str]", Path]:
    """Start a process that creates a folder and waits until its input is closed; return both."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(parent)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.skipif(os.name != "posix", reason="other systems have no SIGKILL")
def test_the_folder_of_a_killed_process_is_deleted_and_that_of_a_running_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, killed_folder = start(tmp_path)
    running, running_folder = start(tmp_path)
    own_folder = Path(make_temporary_folder("weights", str(tmp_path)))
    (tmp_path / "latents-of-a-user").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed_folder.name.startswith(f"latents-{killed.pid}-") and killed_folder.is_dir()
    delete_abandoned_folders([tmp_path, tmp_path / "nowhere"])
    assert {path.name for path in tmp_path.iterdir()} == {running_folder.name, own_folder.name, "latents-of-a-user"}
    with monkeypatch.context() as patch:  # as seen from a container that cannot see the process
        patch.setattr(psutil, "pid_exists", lambda number: False)
        delete_abandoned_folders([tmp_path])
    assert running_folder.is_dir() and own_folder.is_dir()
    running.communicate("")
    assert not running_folder.exists(), "a process that ends deletes its folder"


# Python's garbage collector is paused during imports and always resumed.


def test_garbage_collection_is_paused_during_imports_and_always_resumed() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), pause_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    keep_imported.cache_clear()
    with freeze_imports("this"):
        assert not gc.isenabled()
    assert gc.isenabled()
    count = gc.get_freeze_count()
    lists = [[] for _ in range(50)]  # type: ignore[var-annotated]
    with freeze_imports("this"):
        pass
    # Frozen objects may be freed once nothing refers to them: the count can fall, but it never grows.
    assert len(lists) < gc.get_freeze_count() <= count, "only once in a process"


IN_A_RUN = """
from library.base.collector import keep_imported
keep_imported("a test")
"""
IN_A_TEST = """
from types import SimpleNamespace
from tests.conftest import freeze_collected
freeze_collected(SimpleNamespace(stash={}))
"""


@pytest.mark.parametrize(
    ("module", "num_kept", "freeze"),
    [("triton", "0", IN_A_RUN), ("trident", "more", IN_A_RUN), ("triton", "0", IN_A_TEST)],
    ids=["run", "run without triton", "pytest"],
)
def test_kept_objects_are_deleted_at_exit_if_triton_is_loaded(module: str, num_kept: str, freeze: str) -> None:
    """Triton reports its objects that are still alive as leaked."""
    code = f"""
import atexit, gc, sys
atexit.register(lambda: print("more" if gc.get_freeze_count() else 0))  # runs last
sys.modules[{module!r}] = sys
{freeze}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [num_kept]


# Runs that do not use bitsandbytes and scipy do not import them.


@pytest.mark.slow
def test_a_hidden_library_is_not_found_inside_the_block_and_is_found_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (BITSANDBYTES, "diffusers.utils.import_utils"):  # as in a new process
        monkeypatch.delitem(sys.modules, module, raising=False)
    with hide_library(BITSANDBYTES):
        assert importlib.util.find_spec(BITSANDBYTES) is None
    assert BITSANDBYTES not in sys.modules
    with hide_library(BITSANDBYTES):
        unhide_library(BITSANDBYTES)
        assert BITSANDBYTES not in sys.modules


@pytest.mark.slow
def test_a_library_that_is_already_loaded_stays_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BITSANDBYTES, os)
    with hide_library(BITSANDBYTES):
        assert sys.modules[BITSANDBYTES] is os
    assert sys.modules[BITSANDBYTES] is os


@pytest.mark.slow
def test_a_run_does_not_import_scipy_but_can_import_it_when_needed() -> None:
    """Runs in a process of its own: diffusers and transformers cache which libraries they found."""
    code = """
import sys
from library.environment.hidden_libraries import import_diffusers_hiding_libraries
import_diffusers_hiding_libraries()
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
assert "scipy" not in sys.modules, "imported on the side"
from scipy.special import stdtrit
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_library_that_diffusers_has_already_found_stays_visible() -> None:
    """A program may import diffusers before it trains; its lazy imports rely on the libraries found then."""
    code = """
import diffusers
from library.environment.hidden_libraries import BITSANDBYTES, import_diffusers_hiding_libraries, hide_library
import_diffusers_hiding_libraries()
with hide_library(BITSANDBYTES):
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Installed packages are checked against the required versions.


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
