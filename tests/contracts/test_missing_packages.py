"""A Python that is too old or lacks packages gets one sentence from every script, and no traceback."""

import ast
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from library.base.version import VERSION
from library.environment import requirements
from library.environment.requirements import (
    ROOT,
    check_environment,
    describe_missing,
    list_missing,
    module_of,
    package_of,
    python_path,
    quote,
)

WITHOUT_PACKAGES = ("start.py", "front_end.py", "doctor.py", "plan_memory.py", "release.py")
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "src/musubi_tuner", "tools", "tools/quickstart", "networks", "finetune")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name not in WITHOUT_PACKAGES
]
BARE = [sys.executable, "-S", "-E"]  # without site-packages


def describe_setup(python: Path = Path(sys.executable)) -> str:
    """Return what a Python without packages is told to run: the suite's environment where it has been set up."""
    ours = ROOT / ".venv"
    if python_path(ours).exists():
        return f": run the same command with {python_path(ours)}"
    pip = f"{quote(python)} -m pip install -r {ROOT / 'requirements.txt'}"
    command = f"python3 {ROOT / 'tools' / 'start.py'} setup"
    return f": run `{command}` and the same command with {python_path(ours)}, or install them here with `{pip}`"


def start(script: str, *words: str, python: tuple[str, ...] = tuple(BARE)) -> subprocess.CompletedProcess[str]:
    place = ["-m", script] if script.startswith("benchmarks") else [str(ROOT / script)]
    where = ROOT if script.startswith("benchmarks") else "/"
    return subprocess.run([*python, *place, *words], capture_output=True, text=True, cwd=where)


@pytest.mark.parametrize("script", [*SCRIPTS, "benchmarks", "benchmarks.toys"])
def test_every_script_says_in_one_line_what_to_install(script: str) -> None:
    needs_packages_for_help = script.startswith("tools/") and not re.search("cache_|queue|page", script)
    done = start(script, *(["--help"] if needs_packages_for_help else []))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} lacks packages of this suite (torch, transformers, diffusers and ")
    assert line.endswith(f" more){describe_setup()}")


def test_a_package_of_one_image_format_is_missed_by_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(line.startswith("pillow-heif") for line in (ROOT / "requirements.txt").read_text().splitlines())
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in ("pillow_heif", "scipy") else name)
    monkeypatch.setattr(requirements.sys, "modules", {})
    missing = list_missing()
    monkeypatch.undo()
    assert missing == ["scipy"]


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "train_network" in s or "cache_" in s])
def test_the_help_of_training_and_caching_needs_no_packages(script: str) -> None:
    done = start(script, "--help")
    assert done.returncode == 0 and "--dataset_config" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("script", ["train_network.py", "tools/merge_lora.py", "networks/merge_lora.py"])
def test_the_version_needs_no_packages(script: str) -> None:
    assert start(script, "--version").stdout == f"{Path(script).name} {VERSION}\n"


def test_start_and_doctor_run_without_packages(tmp_path: Path) -> None:
    assert start("tools/start.py", "--help").returncode == 0
    done = start("tools/doctor.py", "--output_dir", str(tmp_path))
    assert done.returncode == 1 and "cannot be imported" in done.stdout and done.stderr == ""
    assert "wrong: torch, transformers," in done.stdout


def test_a_new_environment_without_packages_gets_the_sentence(tmp_path: Path) -> None:
    venv.create(tmp_path / "a b", with_pip=False)
    done = start("train_network.py", "--output_dir", str(tmp_path), python=(str(python_path(tmp_path / "a b")), "-E"))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {python_path(tmp_path / 'a b')} lacks packages")
    assert done.stderr.endswith(f"{describe_setup(python_path(tmp_path / 'a b'))}\n")


def test_a_program_that_imports_the_library_gets_pythons_own_error() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import library.base.errors; import library.memory.devices"
    done = subprocess.run([*BARE, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr and "lacks packages" not in done.stderr


# --- the sentence ---


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be a script of the suite."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "train_network.py"), raising=False)


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 1)])
def test_an_old_python_is_refused_by_name(
    script: None, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(requirements.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "python3.12" else None)
    with pytest.raises(SystemExit) as ended:
        check_environment()
    problem = f"Python {version[0]}.{version[1]} is too old: this suite runs on Python 3.10 to 3.14"
    assert ended.value.code == f"error: {problem}; run the same command with `python3.12`"


def test_a_newer_python_is_refused_only_if_it_lacks_packages(script: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 15, 0))
    check_environment()
    monkeypatch.setattr(requirements, "list_missing", lambda: ["torch"])
    with pytest.raises(SystemExit, match=r"error: Python 3\.15 is too new: .*; "):
        check_environment()


READ_BY_OLD = (
    "__init__.py", "base/__init__.py", "base/command_parser.py", "base/terminal.py", "base/version.py",
    "environment/__init__.py", "environment/lock_file.py", "environment/module_names.py",
    "environment/package_sources.py", "environment/requirements.py", "environment/running.py",
    "environment/torch_builds.py", "../tools/start.py",
)  # fmt: skip


@pytest.mark.parametrize("name", READ_BY_OLD)
def test_what_an_old_python_reads_is_written_for_it(name: str) -> None:
    ast.parse((ROOT / "library" / name).read_text(encoding="utf-8"), feature_version=(3, 6))


def test_one_missing_package_names_the_command_of_pip() -> None:
    pip = f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
    assert describe_missing(["scipy"]) == f"{sys.executable} lacks packages of this suite (scipy): run `{pip}`"


def test_the_environment_of_setup_is_named_where_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "ROOT", tmp_path)
    ours = python_path(tmp_path / ".venv")
    ours.parent.mkdir(parents=True)
    ours.touch()
    assert describe_missing(["torch", "numpy"]).endswith(f"(torch, numpy): run the same command with {ours}")


def test_the_packages_are_those_of_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the library packaging, which a bare Python lacks."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines]
    expected = [r.name for r in parsed if r.marker is None or r.marker.evaluate()]
    assert [name for line in lines if (name := package_of(line))] == expected
    assert [package_of(line) for line in ("# a remark", "", "-e .", "-r other.txt")] == [None] * 4
    assert list_missing() == []
    monkeypatch.delitem(sys.modules, "imagehash", raising=False)
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in ("imagehash", "bitsandbytes") else name)
    assert list_missing() == ["ImageHash"] and module_of("ImageHash") == "imagehash"
