"""tools/doctor.py: what it finds wrong with a machine, and the way out that it names."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools import doctor, start
from tools.doctor import Line


def torch_like(cuda: str | None = None, **card: Any) -> Any:
    """A torch that was built for this version of CUDA and sees this card, or none."""
    seen = SimpleNamespace(
        is_available=lambda: bool(card),
        device_count=lambda: 1,
        get_arch_list=lambda: ["sm_80", "sm_86", "sm_90", "compute_90"],
        get_device_name=lambda number: "RTX 4060",
        get_device_capability=lambda number: card["capability"],
        mem_get_info=lambda number: card["memory"],
    )
    version = SimpleNamespace(cuda=cuda, hip=None)
    return SimpleNamespace(__version__="2.13.0", version=version, cuda=seen, backends=SimpleNamespace())


def found(lines: Any, what: str) -> Line:
    (line,) = [line for line in lines if line.what == what]
    assert isinstance(line, Line)
    return line


GIB = 2**30
DRIVER = ["NVIDIA GeForce RTX 4060, 535.54, 8188 MiB"]


@pytest.mark.parametrize(
    ("torch_there", "driver", "what", "is_wrong", "fix"),
    [
        (torch_like(), DRIVER, "GPU", True, "pytorch.org/get-started"),
        (torch_like("13.0"), DRIVER, "GPU", True, "requires CUDA 13.0: update the driver"),
        (torch_like("13.0"), [], "GPU", False, "far too slow"),
        (torch_like("13.0", capability=(8, 9), memory=(7 * GIB, 8 * GIB)), DRIVER, "GPU 0", False, ""),
        (torch_like("13.0", capability=(8, 9), memory=(3 * GIB, 8 * GIB)), DRIVER, "GPU 0", False, "nvidia-smi"),
        (
            torch_like("13.0", capability=(7, 5), memory=(7 * GIB, 8 * GIB)),
            DRIVER,
            "GPU 0",
            True,
            "kernels only for sm_80",
        ),
        (torch_like("13.0", capability=(12, 0), memory=(7 * GIB, 8 * GIB)), DRIVER, "GPU 0", False, ""),
    ],
    ids=["CPU build", "old driver", "no card", "fine", "busy", "card too old", "compiled for a newer card"],
)
def test_torch_is_held_to_the_card_and_its_driver(
    torch_there: Any, driver: list[str], what: str, is_wrong: bool, fix: str
) -> None:
    line = found(doctor.gpu_lines(torch_there, driver), what)
    assert line.is_wrong is is_wrong
    assert fix in line.fix and bool(line.fix) is bool(fix)


def test_packages_are_held_to_the_versions_that_training_needs(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text('torch>=2\nnumpy>=999\nno-such-package>=1\ntomli>=2; python_version < "3"\n')
    lines = list(doctor.package_lines(path))
    assert not found(lines, "torch").is_wrong
    assert found(lines, "numpy").fix == 'python3 -m pip install -U "numpy>=999"'
    assert found(lines, "no-such-package").found == "missing"
    assert [line.what for line in lines if line.is_wrong] == ["numpy", "no-such-package"]
    assert "tomli" not in {line.what for line in lines}


def test_every_number_format_is_multiplied() -> None:
    lines = list(doctor.product_lines(torch, torch.device("cpu")))
    assert [line.what.rpartition(" ")[2] for line in lines] == [
        "float32", "float16", "bfloat16", "float8_e4m3fn", "int8",
    ]  # fmt: skip
    assert not any(line.is_wrong for line in lines)


def test_a_product_that_is_off_is_wrong_and_one_that_cannot_be_is_not() -> None:
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
    assert "close programs" in found(lines, "main memory").fix
    assert "about this much" in found(lines, "disk").fix
    if os.path.isdir("/dev/shm"):
        assert "--shm-size" in found(lines, "/dev/shm").fix


def test_settings_are_told_without_what_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "huggingface" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("mixed_precision: bf16\nmain_process_ip: 10.0.0.7\nnum_processes: 2\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    text = "\n".join(map(str, doctor.setting_lines()))
    assert "mixed_precision: bf16; num_processes: 2" in text
    assert "10.0.0.7" not in text and "hf_secret" not in text and str(tmp_path) not in text


def test_a_torch_that_cannot_be_imported_is_one_line_and_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main(["--output_dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WRONG torch " in out and "1 wrong: torch" in out
    assert "main memory" in out and "product" not in out


@pytest.mark.parametrize(("said", "is_wrong"), [("moved", False), ("wrong: 1.0", True), ("", True)])
def test_a_step_in_8_bits_is_taken_in_another_process(
    monkeypatch: pytest.MonkeyPatch, said: str, is_wrong: bool
) -> None:
    done = SimpleNamespace(stdout=f"a warning\n{said}\n" if said else "", stderr="", returncode=-11)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    line = doctor.eight_bit_line("cpu")
    assert line.is_wrong is is_wrong
    assert not is_wrong or "--optimizer_type AdamW" in line.fix


@pytest.mark.parametrize("is_there", [True, False])
def test_start_runs_it_with_the_environment_or_without(
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
