"""tools/start.py: when it installs, what it runs, and its error messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from library import torch_builds
from library.training.saving.names import Names
from tools import start
from train import setup_parser

PYTHON = Path("/venv/bin/python")


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository folder that holds only two requirement files."""
    (tmp_path / "requirements.txt").write_text("torch>=2.9\n")
    (tmp_path / "requirements-dev.txt").write_text("pytest>=8\n")
    monkeypatch.setattr(start, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def installs(requirements: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the arguments for pip: every installation is added to this list and succeeds."""
    recorded: list[list[str]] = []
    monkeypatch.setattr(start, "read_version", lambda python: (3, 11, 7))
    monkeypatch.setattr(start, "run", lambda command, **how: 0)
    monkeypatch.setattr(start, "install", lambda venv, python, names, options=(): recorded.append(names))
    monkeypatch.setattr(start, "install_torch", lambda venv, python, tag: None)
    (requirements / "venv").mkdir()
    return recorded


def prepare(root: Path, names: tuple[str, ...]) -> None:
    start.ready_python(root / "venv", names)


# --- the build of torch ---


@pytest.mark.parametrize(
    ("name", "capability", "driver", "tag"),
    [
        ("RTX 5090", 12.0, 580, "cu130"), ("RTX 5090", 12.0, 570, "cu128"), ("RTX 4090", 8.9, 590, "cu130"),
        ("RTX 4090", 8.9, 550, "cu126"), ("GTX 1080 Ti", 6.1, 580, "cu126"), ("Tesla V100", 7.0, 535, "cu126"),
        ("RTX 3090", 8.6, 470, "cu118"),
    ],
)  # fmt: skip
def test_the_newest_torch_with_kernels_for_the_card_is_chosen(
    name: str, capability: float, driver: int, tag: str
) -> None:
    choice = torch_builds.choose_cuda([("GT 710", 3.5, driver), (name, capability, driver)])
    assert choice.index == torch_builds.INDEX + tag and name in choice.reason


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (("GTX 660", 3.0, 470), "no build of torch from 2.6 on has kernels for GTX 660 .*use --torch cpu"),
        (("RTX 5090", 12.0, 520), "RTX 5090 has driver 520, but torch needs 525 or newer: update the driver"),
    ],
)
def test_a_card_without_kernels_or_an_old_driver_ends_with_the_fix(gpu: tuple[str, float, int], message: str) -> None:
    with pytest.raises(torch_builds.NoBuild, match=message):
        torch_builds.choose_cuda([gpu])


def test_machines_without_nvidia_get_their_own_build(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"nvidia-smi": "", "xpu-smi": ""}
    monkeypatch.setattr(torch_builds, "read", lambda command: answers[command[0]])
    monkeypatch.setattr(torch_builds, "list_amd", lambda: ["gfx1100"])
    monkeypatch.setattr(sys, "platform", "linux")
    assert torch_builds.choose().index == torch_builds.INDEX + torch_builds.ROCM_TAG
    monkeypatch.setattr(torch_builds, "list_amd", lambda: ["gfx803"])
    assert torch_builds.choose().index == torch_builds.INDEX + "cpu"
    answers["xpu-smi"] = "| 0 | Intel Arc B580 |"
    assert torch_builds.choose().index == torch_builds.INDEX + "xpu"
    answers["nvidia-smi"] = "NVIDIA GeForce RTX 4090, 8.9, 580.65\nNVIDIA GeForce GTX 1060, 6.1, 580.65\n"
    assert torch_builds.choose().reason == "NVIDIA GeForce RTX 4090 (compute capability 8.9, driver 580)"
    monkeypatch.setattr(sys, "platform", "darwin")
    answers["nvidia-smi"] = ""
    assert torch_builds.choose().index is None


def test_torch_is_chosen_unless_it_is_there_or_pip_is_told_where_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(start, "install", lambda venv, python, names, options: commands.append(options))
    monkeypatch.setattr(start, "chooses_packages", lambda python: told)
    monkeypatch.setattr(start, "run", lambda command, quiet: int(not has_torch))
    monkeypatch.setattr(torch_builds, "is_reachable", lambda index: True)
    monkeypatch.setattr(torch_builds, "choose", lambda: torch_builds.choose_cuda([("RTX 4090", 8.9, 580)]))
    for told, has_torch in ((True, False), (False, True)):  # noqa: B007
        start.install_torch(Path("venv"), PYTHON, None)
    assert not commands
    told, has_torch = False, False
    start.install_torch(Path("venv"), PYTHON, None)
    has_torch = True
    start.install_torch(Path("venv"), PYTHON, "cu126")
    index = torch_builds.INDEX
    assert commands == [
        ("--index-url", index + "cu130", "torch>=2.9"),
        ("--index-url", index + "cu126", "--force-reinstall", "torch>=2.6,<2.15"),
    ]


def test_an_offline_folder_is_the_only_source(requirements: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(start, "read_version", lambda python: (3, 11, 7))
    monkeypatch.setattr(start, "run", lambda command, **how: 0)
    monkeypatch.setattr(start, "install", lambda *call: recorded.append(call[2:]))
    monkeypatch.setattr(torch_builds, "choose", lambda: pytest.fail("no index may be asked"))
    (requirements / "venv").mkdir()
    start.ready_python(requirements / "venv", start.RUN_REQUIREMENTS, start.Source(Path("wheels"), None))
    assert recorded == [(["requirements.txt"], ("--no-index", "--find-links", "wheels"))]
    assert start.main(["setup", "--venv", str(requirements / "venv"), "--offline", str(requirements)]) == 1


# --- when it installs ---


def test_a_second_start_installs_nothing(requirements: Path, installs: list[list[str]]) -> None:
    prepare(requirements, start.RUN_REQUIREMENTS)
    prepare(requirements, start.RUN_REQUIREMENTS)
    assert installs == [["requirements.txt"]]


def test_running_tests_after_the_quickstart_installs_both_requirement_files(
    requirements: Path, installs: list[list[str]]
) -> None:
    prepare(requirements, start.RUN_REQUIREMENTS)
    prepare(requirements, start.TEST_REQUIREMENTS)
    prepare(requirements, start.RUN_REQUIREMENTS)
    assert installs == [["requirements.txt"], ["requirements.txt", "requirements-dev.txt"]]


def test_changed_requirements_are_installed_again(requirements: Path, installs: list[list[str]]) -> None:
    prepare(requirements, start.RUN_REQUIREMENTS)
    (requirements / "requirements.txt").write_text("torch>=2.10\n")
    prepare(requirements, start.RUN_REQUIREMENTS)
    assert len(installs) == 2


def test_windows_line_endings_do_not_count_as_a_change(requirements: Path) -> None:
    digest = start.digest_text(requirements / "requirements.txt")
    (requirements / "requirements.txt").write_bytes(b"torch>=2.9\r\n")
    assert start.digest_text(requirements / "requirements.txt") == digest


def test_another_python_in_the_environment_installs_again(
    requirements: Path, installs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(requirements, start.RUN_REQUIREMENTS)
    monkeypatch.setattr(start, "read_version", lambda python: (3, 12, 1))
    prepare(requirements, start.RUN_REQUIREMENTS)
    assert len(installs) == 2


def test_an_interrupted_installation_is_repeated(
    requirements: Path, installs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(requirements, start.RUN_REQUIREMENTS)
    (requirements / "requirements.txt").write_text("torch>=2.10\n")

    def stop(venv: Path, python: Path, names: list[str], options: tuple[str, ...]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(start, "install", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(requirements, start.RUN_REQUIREMENTS)
    (requirements / "requirements.txt").write_text("torch>=2.9\n")  # covered by the earlier stamp
    prepare(requirements, start.RUN_REQUIREMENTS)
    assert len(installs) == 2


def test_a_damaged_stamp_counts_as_not_installed(requirements: Path, installs: list[list[str]]) -> None:
    prepare(requirements, start.RUN_REQUIREMENTS)
    (stamp,) = (requirements / "venv").glob("*.stamp")
    original = stamp.read_text()
    stamp.write_text(original[:-3])
    prepare(requirements, start.RUN_REQUIREMENTS)
    assert installs == 2 * [["requirements.txt"]] and stamp.read_text() == original


# --- what it runs ---


def test_the_quickstart_trains_as_on_photos_of_ones_own() -> None:
    python, script, *arguments = start.training_command(PYTHON)
    args = setup_parser().parse_args(arguments)
    assert (python, script) == (str(PYTHON), "train.py") and args.yes
    assert Names(args.output_dir, args.name, "safetensors").of_end() == Path(start.ADAPTER)
    assert Names(args.output_dir, args.name, "safetensors").of_report() == Path(start.REPORT)


def test_train_passes_everything_on_to_train_py(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(start, "ready_python", lambda venv, names: PYTHON)
    monkeypatch.setattr(start.subprocess, "call", lambda command: called.append(command) or 3)
    arguments = ["--base", "a b.safetensors", "my photos", "--steps", "5"]
    assert start.main(["train", "--venv", "x", *arguments]) == 3
    assert called == [[str(PYTHON), str(start.ROOT / "train.py"), *arguments]]
    with pytest.raises(SystemExit):
        start.main(["doctor", "--base", "x"])


def test_the_quickstart_generates_an_image_with_the_adapter_it_trained() -> None:
    command = start.image_command(PYTHON)
    assert command[1] == "tools/quickstart/draw_before_after.py"
    assert command[command.index("--lora") + 1] == start.ADAPTER
    assert command[command.index("--out") + 1] == start.IMAGE
    assert command[command.index("--report") + 1] == start.REPORT


@pytest.mark.parametrize(
    ("slow", "tier"), [(False, "not slow and not gpu and not nightly"), (True, "not gpu and not nightly")]
)
def test_the_test_command_selects_the_tier_and_forwards_arguments(
    slow: bool, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "num_threads", lambda: 3)
    command = start.pytest_command(PYTHON, slow, ["-k", "dataset"])
    assert command == [
        str(PYTHON), "-m", "pytest", "-m", tier, "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder",
        "-k", "dataset",
    ]  # fmt: skip
    with_argument = start.pytest_command(PYTHON, slow, ["tests/runs/test_resume.py::test_x"])
    assert with_argument[with_argument.index("-m", 2) + 1] == "not gpu"


@pytest.mark.parametrize(("slow", "tier"), [(False, "gpu and not slow and not nightly"), (True, "gpu and not nightly")])
def test_gpu_tests_run_on_a_simulated_gpu_in_a_separate_process(
    slow: bool, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "num_threads", lambda: 3)
    assert start.simulated_gpu_command(PYTHON, slow) == [
        str(PYTHON), "-m", "pytest", "-p", "tests.simulated_gpu.plugin", "-m", tier, "-n", "3", "--dist", "loadfile",
        "--no-loadscope-reorder", "tests/gpu", "tests/simulated_gpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "statuses", "status", "num_runs"),
    [([], [0, 0], 0, 2), ([], [0, 1], 1, 2), ([], [1], 1, 1), (["-k", "dataset"], [2], 2, 1)],
)
def test_gpu_tests_run_first_unless_pytest_gets_arguments(
    arguments: list[str], statuses: list[int], status: int, num_runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(start, "ready_python", lambda venv, names: PYTHON)
    monkeypatch.setattr(start, "run", lambda command: commands.append(command) or statuses[len(commands) - 1])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert start.run_tests(Path("/venv"), False, arguments) == status
    assert len(commands) == num_runs
    assert [("tests.simulated_gpu.plugin" in command) for command in commands] == [not arguments, False][:num_runs]


def test_arguments_after_two_dashes_are_passed_to_pytest() -> None:
    assert start.split_at_dashes(["test", "--slow", "--", "-m", "gpu", "--", "x"]) == (
        ["test", "--slow"],
        ["-m", "gpu", "--", "x"],
    )


def test_pip_gets_every_requirement_file_by_its_full_path(requirements: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.shutil, "which", lambda name: None)
    command = start.install_command(PYTHON, ["requirements.txt", "requirements-dev.txt"])
    assert command[1:4] == ["-m", "pip", "install"]
    assert [command[i + 1] for i, word in enumerate(command) if word == "-r"] == [
        str(requirements / "requirements.txt"),
        str(requirements / "requirements-dev.txt"),
    ]


def test_uv_is_used_if_available_with_the_indexes_of_pip(requirements: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    command = start.install_command(PYTHON, ["requirements.lock"])
    assert command[:5] == ["/usr/bin/uv", "pip", "install", "--python", str(PYTHON)]
    assert command[5:] == ["-r", str(requirements / "requirements.lock")]
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.example https://b.example")
    assert start.uv_indexes() == [
        "--extra-index-url", "https://a.example", "--extra-index-url", "https://b.example",
        "--index-strategy", "unsafe-best-match",  # as pip: the newest of all indexes
    ]  # fmt: skip


def test_the_lock_pins_everything_that_is_required() -> None:
    from packaging.requirements import Requirement

    def lines(name: str) -> list[Requirement]:
        text = (start.ROOT / name).read_text(encoding="utf-8")
        return [Requirement(line) for line in text.splitlines() if line and not line.lstrip().startswith("#")]

    locked: dict[str, list[Requirement]] = {}
    for line_of_lock in lines("requirements.lock"):
        locked.setdefault(line_of_lock.name.lower().replace("_", "-"), []).append(line_of_lock)
    for requirement in lines("requirements.txt"):
        pins = locked[requirement.name.lower().replace("_", "-")]
        for pin in pins:
            (version,) = (part.version for part in pin.specifier)
            assert str(pin.specifier) == f"=={version}" and requirement.specifier.contains(version), pin


def test_the_environment_comes_from_the_option_then_the_variable_then_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("START_VENV", "/from/variable")
    assert start.setup_parser().parse_args(["test"]).venv == Path("/from/variable")
    assert start.setup_parser().parse_args(["test", "--venv", "/from/option"]).venv == Path("/from/option")
    monkeypatch.delenv("START_VENV")
    assert start.setup_parser().parse_args(["quickstart"]).venv == start.ROOT / ".venv"


def test_the_exit_status_of_the_command_is_passed_through() -> None:
    assert start.run([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_started_commands_run_in_the_repository_and_cannot_reach_the_hub(tmp_path: Path) -> None:
    script = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.getcwd() + os.environ['HF_HUB_OFFLINE'])"
    assert start.run([sys.executable, "-c", script, str(tmp_path / "seen")]) == 0
    assert (tmp_path / "seen").read_text() == str(start.ROOT) + "1"


# --- messages ---


@pytest.mark.parametrize(
    ("version", "complaint"),
    [((3, 9), "Python 3.9 is too old"), ((3, 15), "Python 3.15 is too new"), ((2, 7), "Python 2.7 is too old")],
)
def test_the_error_for_an_unsupported_python_names_the_supported_range(
    version: tuple[int, int], complaint: str
) -> None:
    with pytest.raises(start.StartError) as error:
        start.check_python(version)
    assert str(error.value).startswith(f"{complaint}: this suite runs on Python 3.10 to 3.14; ")


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12), (3, 13), (3, 14)])
def test_supported_python_versions_pass(version: tuple[int, int]) -> None:
    start.check_python(version)


def test_the_error_for_an_unsupported_python_names_a_supported_one_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.shutil, "which", lambda name: "/usr/bin/" + name if name == "python3.12" else None)
    with pytest.raises(start.StartError, match=r"run the same command with `python3\.12`"):
        start.check_python((3, 9))


def test_the_error_for_a_missing_venv_module_names_the_debian_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(start.StartError, match="apt install python3-venv"):
        start.make_venv(tmp_path / "venv")


def test_a_folder_that_is_not_an_environment_is_not_modified(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"x")
    with pytest.raises(start.StartError, match="not a virtual environment"):
        start.make_venv(tmp_path)
    assert (tmp_path / "holiday.png").exists()


def test_a_full_disk_is_reported_before_pip_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1024**3}))
    with pytest.raises(start.StartError, match=r"1\.0 GiB are free .* need at least 3 GiB"):
        start.check_disk(tmp_path)


@pytest.mark.parametrize(
    ("complaint", "cause"),
    [
        ("No matching distribution found for torch>=99", "the installer ended with status 1"),
        ("No space left on device", "the disk is full"),
    ],
)
def test_a_pip_failure_shows_its_last_lines_and_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: str, cause: str
) -> None:
    pip = [sys.executable, "-c", f"import sys; sys.stderr.write('ERROR: {complaint}\\n'); sys.exit(1)"]
    monkeypatch.setattr(start, "install_command", lambda python, names, options: pip)
    monkeypatch.setattr(start, "check_disk", lambda venv: None)
    with pytest.raises(start.StartError) as error:
        start.install(tmp_path, PYTHON, ["requirements.txt"])
    message = str(error.value)
    assert cause in message
    assert f"    ERROR: {complaint}\n" in message
    assert "Run the same command again" in message


def test_a_missing_command_is_a_usage_error() -> None:
    ended = subprocess.run([sys.executable, "tools/start.py"], cwd=start.ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "quickstart" in ended.stderr


def test_a_quickstart_that_wrote_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setattr(start, "ready_python", lambda venv, names: PYTHON)
    monkeypatch.setattr(start, "run", lambda command: 0)
    with pytest.raises(start.StartError, match=r"quickstart\.safetensors"):
        start.quickstart(tmp_path / "venv")


def test_the_adapter_of_an_earlier_quickstart_is_drawn_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setattr(start, "ready_python", lambda venv, names: PYTHON)
    monkeypatch.setattr(start, "run", lambda command: started.append(command) or 0)
    (tmp_path / start.ADAPTER).parent.mkdir(parents=True)
    (tmp_path / start.ADAPTER).write_bytes(b"of an earlier quickstart")
    with pytest.raises(start.StartError, match=r"wrote no output/quickstart/before_after\.png"):
        start.quickstart(tmp_path / "venv")
    assert [command[1] for command in started] == ["tools/quickstart/draw_before_after.py"]


def test_a_failed_training_ends_the_quickstart_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(start, "ready_python", lambda venv, names: PYTHON)
    monkeypatch.setattr(start, "run", lambda command: started.append(command) or 3)
    assert start.quickstart(Path("venv")) == 3
    assert len(started) == 1
