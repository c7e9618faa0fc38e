"""tools/doctor.py: the problems it finds on a machine and the fixes it suggests."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.environment import torch_builds
from library.environment.torch_builds import list_compiler_needs
from library.front_ends.journal import Place
from tests.unit.tools.small_suite import build_small_suite, write_files
from tools import doctor, start
from tools.doctor import Line


def torch_like(cuda: str | None = None, **gpu: Any) -> Any:
    """Return a stand-in for torch built for a CUDA version, with one GPU or none."""
    cuda_module = SimpleNamespace(
        is_available=lambda: bool(gpu),
        device_count=lambda: 1,
        get_arch_list=lambda: ["sm_80", "sm_86", "sm_90", "compute_90"],
        get_device_name=lambda number: "RTX 4060",
        get_device_capability=lambda number: gpu["capability"],
        mem_get_info=lambda number: gpu["memory"],
    )
    version = SimpleNamespace(cuda=cuda, hip=None)
    return SimpleNamespace(__version__="2.13.0", version=version, cuda=cuda_module, backends=SimpleNamespace())


def find_line(lines: Any, subject: str) -> Line:
    (line,) = [line for line in lines if line.what == subject]
    assert isinstance(line, Line)
    return line


GIB = 2**30
DRIVER = ["NVIDIA GeForce RTX 4060, 535.54, 8188 MiB"]


@pytest.mark.parametrize(
    ("reason", "needs", "remark"),
    [
        (None, [], ""),
        ("no working Triton", [], "take more memory"),
        ("the compiler failed (x)", ["gcc", "python3-dev"], "take more memory: install gcc and python3-dev"),
    ],
)
def test_the_compiler_of_fused_operations_is_tried(
    reason: str | None, needs: list[str], remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.memory.fused_kernels.find_compiler_fault", lambda device: reason)
    monkeypatch.setattr(doctor, "list_compiler_needs", lambda: needs)
    line = doctor.fused_line(torch.device("cpu"))
    assert not line.is_wrong and line.fix.endswith(remark)
    assert line.found.startswith("compiled in " if reason is None else reason)


def test_a_missing_c_compiler_and_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert list_compiler_needs() == ["gcc", "python3-dev"]
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert list_compiler_needs() == []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert list_compiler_needs() == ["triton-windows"]


@pytest.mark.parametrize(
    ("torch_there", "driver", "subject", "is_wrong", "fix"),
    [
        (torch_like(), DRIVER, "GPU", True, "is a build without CUDA: run python3 tools/start.py setup --torch cu126"),
        (torch_like("13.0"), DRIVER, "GPU", True, "requires CUDA 13.0: run python3 tools/start.py setup --torch cu126"),
        (torch_like("13.0"), [], "GPU", False, "far too slow"),
        (torch_like("13.0", capability=(8, 9), memory=(7 * GIB, 8 * GIB)), DRIVER, "GPU 0", False, ""),
        (torch_like("13.0", capability=(8, 9), memory=(3 * GIB, 8 * GIB)), DRIVER, "GPU 0", False, "nvidia-smi"),
        (
            torch_like("13.0", capability=(7, 5), memory=(7 * GIB, 8 * GIB)),
            DRIVER,
            "GPU 0",
            True,
            "kernels only for sm_80, sm_86, sm_90, compute_90: run python3 tools/start.py setup --torch cu126",
        ),
        (torch_like("13.0", capability=(12, 0), memory=(7 * GIB, 8 * GIB)), DRIVER, "GPU 0", False, ""),
    ],
    ids=["CPU build", "old driver", "no card", "fine", "busy", "card too old", "compiled for a newer card"],
)
def test_torch_is_checked_against_the_gpu_and_its_driver(
    torch_there: Any, driver: list[str], subject: str, is_wrong: bool, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_builds, "list_nvidia", lambda: [("RTX 4060", 8.9, 535)])
    line = find_line(doctor.gpu_lines(torch_there, driver), subject)
    assert line.is_wrong is is_wrong
    assert fix in line.fix and bool(line.fix) is bool(fix)


def test_packages_are_checked_against_the_required_versions(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text('torch>=2\nnumpy>=999\nno-such-package>=1\ntomli>=2; python_version < "3"\n')
    lines = list(doctor.package_lines(path))
    assert not find_line(lines, "torch").is_wrong
    assert find_line(lines, "numpy").fix == 'python3 -m pip install -U "numpy>=999"'
    assert find_line(lines, "no-such-package").found == "missing"
    assert [line.what for line in lines if line.is_wrong] == ["numpy", "no-such-package"]
    assert "tomli" not in {line.what for line in lines}


def test_every_number_format_is_tested_with_a_product() -> None:
    lines = list(doctor.product_lines(torch, torch.device("cpu")))
    assert [line.what.rpartition(" ")[2] for line in lines] == [
        "float32", "float16", "bfloat16", "float8_e4m3fn", "int8",
    ]  # fmt: skip
    assert not any(line.is_wrong for line in lines)


def test_an_inaccurate_product_is_an_error_and_an_unsupported_one_is_not() -> None:
    exact = torch.randn(8, 8, generator=torch.Generator().manual_seed(771)).double()
    assert not doctor.product_line("p", lambda: exact * (1 + 1e-3), exact, 2e-3).is_wrong
    for product in (exact * (1 + 4e-3), exact * float("nan")):
        assert doctor.product_line("p", lambda product=product: product, exact, 2e-3).is_wrong

    def refuse() -> Any:
        raise RuntimeError("sm_89 or newer\nis needed")

    line = doctor.product_line("p", refuse, exact, 2e-3)
    assert not line.is_wrong and "sm_89 or newer" in line.fix


def test_little_memory_and_disk_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import psutil

    few = SimpleNamespace(total=16 * GIB, available=3 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB // 2))
    lines = [*doctor.memory_lines(None), *doctor.disk_lines({"disk": tmp_path / "not" / "there"})]
    assert "close programs" in find_line(lines, "main memory").fix
    assert "about this much" in find_line(lines, "disk").fix
    if os.path.isdir("/dev/shm"):
        assert "--shm-size" in find_line(lines, "/dev/shm").fix


def test_settings_are_shown_without_private_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "huggingface" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("mixed_precision: bf16\nmain_process_ip: 10.0.0.7\nnum_processes: 2\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    text = "\n".join(map(str, doctor.setting_lines()))
    assert "mixed_precision: bf16; num_processes: 2" in text
    assert "10.0.0.7" not in text and "hf_secret" not in text and str(tmp_path) not in text


def test_a_torch_import_error_is_one_line_and_other_checks_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main(["--output_dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WRONG torch " in out and "1 wrong: torch" in out
    assert "main memory" in out and "product" not in out


@pytest.mark.parametrize(("output", "is_wrong"), [("moved", False), ("wrong: 1.0", True), ("", True)])
def test_an_8_bit_optimizer_step_runs_in_a_separate_process(
    monkeypatch: pytest.MonkeyPatch, output: str, is_wrong: bool
) -> None:
    done = SimpleNamespace(stdout=f"a warning\n{output}\n" if output else "", stderr="", returncode=-11)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    line = doctor.eight_bit_line("cpu")
    assert line.is_wrong is is_wrong
    assert not is_wrong or "--optimizer_type AdamW" in line.fix


@pytest.mark.parametrize("is_there", [True, False])
def test_start_runs_doctor_with_or_without_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_there: bool
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(start, "read_version", lambda python: (3, 11, 7) if is_there else None)
    monkeypatch.setattr(start, "run", lambda command: ran.append(command) or 1)
    assert start.main(["doctor", "--venv", "/some/venv"]) == 1
    ((python, script),) = ran
    assert script == "tools/doctor.py"
    assert python == (str(start.python_path(Path("/some/venv"))) if is_there else sys.executable)
    assert ("is not ready, so this Python is checked" in capsys.readouterr().out) is not is_there


def test_files_that_another_program_put_into_the_folder_are_wrong(tmp_path: Path) -> None:
    """Front ends may check sd-scripts out over the suite that was installed there."""
    suite = build_small_suite(tmp_path / "suite")
    write_files(tmp_path / "gui", {"sd-scripts/train_network.py": "theirs"})
    assert suite.run(tmp_path / "gui").returncode == 0
    place = Place(tmp_path / "gui" / "sd-scripts")
    assert not doctor.suite_line(place).is_wrong and "as installed" in doctor.suite_line(place).found
    write_files(tmp_path / "gui", {"sd-scripts/train_network.py": "theirs"})
    line = doctor.suite_line(place)
    assert line.is_wrong and "changed: train_network.py" in line.found and "front_end.py" in line.fix
    assert not doctor.suite_line(Place(doctor.ROOT)).is_wrong  # this checkout is in no front end
