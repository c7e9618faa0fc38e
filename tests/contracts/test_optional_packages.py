"""Every command asks for the optional packages of its options before it reads a model or an image.

The base model is a damaged file, which a command that reads it first would name. What every run needs is asked for
when a script starts, see test_missing_packages.py.
"""

import ast
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.registry import _registry
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
from tests.contracts.test_overwriting import command_of
from tests.hiding import OPTIONAL, hide
from tests.running import STARTED, Finished, make_images

Train = Callable[..., Finished]
# Module -> the options that need it, and pip's name of its package.
OPTIONS: dict[str, tuple[str, str]] = {
    "wandb": ("--log_with wandb", "wandb"),
    "tensorboard": ("--log_with tensorboard --logging_dir {out}", "tensorboard"),
    "bitsandbytes.optim": ("--optimizer_type AdamW8bit", "bitsandbytes"),
    "bitsandbytes": ("--base_format nf4", "bitsandbytes"),
    "prodigyopt": ("--optimizer_type Prodigy", "prodigyopt"),
    "schedulefree": ("--optimizer_type AdamWScheduleFree", "schedulefree"),
    "dadaptation": ("--optimizer_type DAdaptAdam", "dadaptation"),
    "lion_pytorch": ("--optimizer_type Lion", "lion-pytorch"),
    "came_pytorch": ("--optimizer_type came_pytorch.CAME", "came-pytorch"),
    "users_rates": ("--lr_scheduler_type users_rates.Wave", "users-rates"),
    "users_images": ("--dataset_class users_images.All", "users-images"),
    "lycoris": ("--network_module lycoris.kohya", "lycoris-lora"),
}
TOOLS = {
    "tools/choose_checkpoint.py": "--script train_network.py --files {base}",
    "tools/contact_sheet.py": "--script train_network.py --files {base} --sample_prompts {prompts}",
}
DATA = {
    "pyarrow": ('parquet = "{folder}/a.parquet"', "parquet (and shards)"),
    "datasets": ('dataset_name = "me/cats"', "dataset_name"),
    "s3fs": ('shards = "s3://bucket/a.tar"', "s3://"),
}
BROKEN = (OSError("libcudart.so.9: no such file"), RuntimeError("CUDA setup failed"), AttributeError("np.float_"))
STATES = [None, *BROKEN]  # None: missing


def sentences(package: str, error: Exception | None) -> tuple[str, str]:
    """Return what a message says of a package that is missing, or raises `error` when it is imported, and pip's
    command."""
    if error is None:
        return package, f"pip install {package}"
    return f" cannot be imported ({type(error).__name__}: {error})", f"pip install --upgrade {package}"


WORK_WITHOUT = {"pillow_heif", "pynvml", "xformers"}


def test_every_optional_package_has_a_case() -> None:
    assert {*OPTIONAL} == {module.partition(".")[0] for module in OPTIONS} & {*OPTIONAL} | {*DATA} & {
        *OPTIONAL
    } | WORK_WITHOUT


@pytest.mark.parametrize("error", STATES[:2])
def test_a_training_that_asks_for_no_package_works_without_all(
    error: Exception | None, base_arguments: list[str], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in OPTIONAL:
        hide(module, monkeypatch, error)
    done = train([*base_arguments, "--max_train_steps", "1", "--xformers"]).ok()
    assert (
        "using torch's scaled dot product attention" in done.stderr and sentences("xformers", error)[1] in done.stderr
    )


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The options of a training whose base model cannot be read."""
    (tmp_path / "base.safetensors").write_bytes(b"damaged")
    make_images(tmp_path / "images" / "2_cat", 1)
    return [
        "--pretrained_model_name_or_path",
        str(tmp_path / "base.safetensors"),
        "--train_data_dir",
        str(tmp_path / "images"),
        "--output_dir",
        str(tmp_path / "out"),
        "--output_name",
        "mine",
        "--max_train_steps",
        "1",
        "--resolution",
        "64",
    ]


# train_leco.py and tools/draw.py read the header of the base model first, which chooses the script; then they do as
# the others.
SCRIPTS = ["train_network", *sorted({*STARTED} - {"train_network", "train_leco"})]
CASES = [
    *((script, module, None) for script in SCRIPTS for module in OPTIONS),
    *(("train_network", module, error) for module, error in zip(OPTIONS, BROKEN * len(OPTIONS), strict=False)),
]


@pytest.mark.parametrize(
    ("script", "module", "error"),
    [pytest.param(*case, marks=() if case[0] == "train_network" else pytest.mark.slow) for case in CASES],
)
def test_a_training_names_the_package_before_it_reads_the_base_model(
    script: str,
    module: str,
    error: Exception | None,
    words: list[str],
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide(module.partition(".")[0], monkeypatch, error)
    options, package = OPTIONS[module]
    more = options.format(out=tmp_path / "logs").split()
    network = [] if "--network_module" in more else ["--network_module", "networks.lora"]
    (tmp_path / "prompts.toml").write_text('[[prompts]]\ntarget = "cat"\n')
    leco = ["--prompts_file", str(tmp_path / "prompts.toml")] if script.endswith("leco") else []
    done = train([*words, *network, *more, *leco], script)
    printed = " ".join(done.stderr.split())
    assert done.status == 1 and " ".join(more[:2]) in printed and "this is a bug" not in printed, printed
    assert all(sentence in printed for sentence in sentences(package, error)), printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("error", STATES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_names_the_package_before_it_reads_the_base_model(
    tool: str,
    error: Exception | None,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hide("bitsandbytes", monkeypatch, error)
    (tmp_path / "prompts.txt").write_text("a cat")
    named = TOOLS[tool].format(base=tmp_path / "base.safetensors", prompts=tmp_path / "prompts.txt")
    before = sorted(tmp_path.rglob("*"))
    assert command_of(tool)([*named.split(), *words, "--base_format", "nf4"]) == 1
    printed = capsys.readouterr().err
    assert all(sentence in printed for sentence in ("--base_format nf4", *sentences("bitsandbytes", error))), printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", STATES[:2])
@pytest.mark.parametrize("package", DATA)
@pytest.mark.parametrize("command", ["train_network.py", "tools/cache_latents.py", "tools/make_shards.py"])
def test_a_source_of_images_names_its_package_before_any_other_is_read(
    package: str,
    error: Exception | None,
    command: str,
    tiny_sd_folder: Path,
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first source is a damaged image, which listing would report."""
    hide(package, monkeypatch, error)
    monkeypatch.delitem(_registry, "s3", raising=False)  # the class, which another test may have used
    folder = make_images(tmp_path / "images", 1)
    (folder / "00.png").write_bytes(b"damaged")
    subsets = (f'image_dir = "{folder.as_posix()}"', DATA[package][0].format(folder=tmp_path.as_posix()))
    config = tmp_path / "dataset.toml"
    text = "".join(f"[[datasets.subsets]]\n{subset}\n" for subset in subsets)
    config.write_text(f"[[datasets]]\nresolution = 64\n{text}")
    words = ["--dataset_config", str(config), "--cache_dir", str(tmp_path / "cache")]
    model = ["--pretrained_model_name_or_path", str(tiny_sd_folder), "--output_dir", str(tmp_path / "out")]
    before = sorted(tmp_path.rglob("*"))
    if command == "train_network.py":
        network = ["--output_name", "mine", "--network_module", "networks.lora", "--max_train_steps", "1"]
        status = (done := train([*words, *model, *network])).status
        printed = done.stderr
    else:
        status = command_of(command)([*words, *(model if "cache" in command else ["--out", str(tmp_path / "shards")])])
        printed = capfd.readouterr().err
    said = " ".join(printed.split())
    assert status == 1 and all(sentence in said for sentence in (DATA[package][1], *sentences(package, error))), said
    assert "00.png" not in printed and sorted(tmp_path.rglob("*")) == before


# A Python that is too old or lacks packages gets one sentence from every script, and no traceback.

WITHOUT_PACKAGES = ("start.py", "front_end.py", "doctor.py", "plan_memory.py", "release.py")
STARTED_FILES = [
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


@pytest.mark.parametrize("script", [*STARTED_FILES, "benchmarks", "benchmarks.toys"])
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


@pytest.mark.parametrize("script", [s for s in STARTED_FILES if "train_network" in s or "cache_" in s])
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
