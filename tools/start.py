"""Set up and run this suite: `tools/start.py quickstart` trains a small LoRA, `tools/start.py train` one on photos,
`tools/start.py page` opens a page to train from, `tools/start.py test` runs the tests, `tools/start.py doctor` checks
whether this machine can train.

Needs only Python and its standard library. The packages are installed into `.venv` in this folder (elsewhere: --venv
PATH or the variable START_VENV), and reinstalled only if a requirements file or the environment's Python changes.
"""

# An old Python must be able to parse this file in order to reject itself, so the syntax is that of Python 3.6 and
# annotations are quoted.

import argparse
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

NEEDS_PACKAGES = False  # read by library/environment/requirements.py
ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(ROOT))

from library.base.command_parser import CommandParser, add_errors_json, make_parser  # noqa: E402
from library.base.terminal import ERRORS_JSON, print_error, print_line  # noqa: E402
from library.environment import torch_builds  # noqa: E402
from library.environment.lock_file import format_entries  # noqa: E402
from library.environment.package_sources import Source, chooses_packages, uv_options  # noqa: E402
from library.environment.requirements import OLDEST_PYTHON, python_path, python_problem, suggest_python  # noqa: E402
from library.environment.running import INTERRUPTED, replace_process, run  # noqa: E402

REQUIREMENTS, TESTED, FOR_TESTS = "requirements.txt", "requirements.lock", "requirements-dev.txt"
RUN_REQUIREMENTS = (TESTED,)
PAGE_REQUIREMENTS = (TESTED, "requirements-page.txt")
TEST_REQUIREMENTS = (TESTED, FOR_TESTS)
SMALLEST_INSTALL_BYTES = 3 * 1024**3  # torch's CPU build and the rest; CUDA builds take about three times as much
MAX_QUICKSTART_THREADS = 8  # the toy model is too small for more

GPU_TESTS = ("tests/gpu", "tests/simulated_gpu")
TOY_BASE = "configs/quickstart/toy_base"
PHOTOS = "configs/quickstart/dataset"
PROMPTS = "configs/quickstart/prompts.txt"
ADAPTER = "output/quickstart/quickstart.safetensors"
IMAGE = "output/quickstart/before_after.png"
REPORT = "output/quickstart/quickstart-report.html"


class StartError(Exception):
    """An error that the user can fix; the message says how. `fields` are those of a UserError, which needs a newer
    Python."""

    def __init__(
        self, message: str, remedy: "str | None" = None, setting: "str | None" = None, cause: "Any" = None
    ) -> None:
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.fields = (message, remedy, setting, cause)


# --- Python ---


def check_python(version: "tuple[int, int]") -> None:
    """Raise StartError with the fix if this Python version is not supported."""
    problem = python_problem(version)
    if problem is not None:
        raise StartError(problem, suggest_python(), None, "not installed")


# --- the environment ---


def read_version(python: Path) -> "tuple[int, int, int] | None":
    """Return an interpreter's version; None if it is missing or does not start."""
    try:
        process = subprocess.run(
            [str(python), "-c", "import sys; print(*sys.version_info[:3])"], stdout=subprocess.PIPE, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor, micro = map(int, process.stdout.split())
    return major, minor, micro


def make_venv(venv: Path) -> None:
    """Create the virtual environment, or recreate it if its Python no longer starts.

    Raises StartError if the folder has other content, if this Python lacks venv or ensurepip, or if creation fails.
    """
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise StartError(
            f"{venv} exists but is not a virtual environment",
            "use another folder with --venv",
            "--venv",
            "would be lost",
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise StartError(
            "this Python lacks the modules for virtual environments (venv, ensurepip)",
            "on Debian and Ubuntu get them with `sudo apt install python3-venv` "
            f"(or `python3.{sys.version_info[1]}-venv`), then run this command again",
            None,
            "not installed",
        )
    print_line(f"Creating the virtual environment {venv}")
    if run([sys.executable, "-m", "venv", "--clear", str(venv)]) != 0:
        remedy = "delete that folder and run this command again"
        raise StartError(f"creating {venv} failed, see the lines above", remedy)


def digest_text(path: Path) -> str:
    """Return the SHA-256 of a text file, regardless of its line endings."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def is_installed(venv: Path, version: "tuple[int, int, int]", names: "tuple[str, ...]") -> bool:
    """Return True if these requirement files are up to date in the environment."""
    stamps = make_stamps(venv, version, names)
    return all(path.is_file() and path.read_text(encoding="utf-8") == content for path, content in stamps.items())


def make_stamps(venv: Path, version: "tuple[int, int, int]", names: "tuple[str, ...]") -> "dict[Path, str]":
    """Return the stamp files that record the installed packages, with their content for these requirement files and
    this Python."""
    return {venv / f"start-{name}.stamp": f"{digest_text(ROOT / name)} {version}" for name in names}


def install_command(python: Path, requirement_names: "list[str]", options: "tuple[str, ...]" = ()) -> "list[str]":
    """Return the command that installs requirement files, with uv if it is installed, else with pip."""
    uv = shutil.which("uv")
    if uv is None:
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    else:
        command = [uv, "pip", "install", "--python", str(python), *uv_options()]
    command += options
    for name in requirement_names:
        command += ["-r", str(ROOT / name)]
    return command


def install_torch(venv: Path, python: Path, tag: "str | None") -> None:
    """Install the newest torch whose build has kernels for this machine's GPU, or the build of a tag.

    Without a tag, an installed torch stays, and settings of pip that say where packages come from decide. Raises
    StartError if no build has kernels, or if the installation fails.
    """
    has_torch = run([str(python), "-c", "import torch"], quiet=True) == 0
    if tag is None and (has_torch or chooses_packages(python)):
        return
    try:
        choice = torch_builds.named(tag) if tag else torch_builds.choose()
    except torch_builds.NoBuild as error:
        raise StartError(str(error), None, "--torch", "wrong value") from None
    is_reachable = choice.index is None or torch_builds.is_reachable(choice.index)
    if not is_reachable:
        print_line(f"{choice.index} cannot be reached, so torch comes from PyPI; `doctor` checks it")
    source = choice.index if is_reachable else None
    place = "PyPI" if source is None else source
    print_line(f"{choice.reason}: installing {choice.requirement} from {place} (another build: --torch TAG)")
    index = () if source is None else ("--index-url", source)
    again = ("--force-reinstall",) if tag and has_torch else ()
    install(venv, python, [], (*index, *again, choice.requirement))


def ask_settings(python: Path, source: Source) -> bool:
    """Return True if the user's settings choose the packages, and say which torch this machine's GPU needs then."""
    if source.wheels is not None or not chooses_packages(python):
        return False
    note = "" if source.torch else torch_builds.describe_build()
    if note:
        print_line(f"note  {note}")
    return True


def check_disk(venv: Path) -> None:
    """Raise StartError if the disk of `venv` has too little space for the packages."""
    free_bytes = shutil.disk_usage(str(venv)).free
    if free_bytes < SMALLEST_INSTALL_BYTES:
        raise StartError(
            f"{free_bytes / 1024**3:.1f} GiB are free where {venv} is, the packages need at least "
            f"{SMALLEST_INSTALL_BYTES / 1024**3:.0f} GiB",
            "free space or use a folder on another disk with --venv",
            "--venv",
            "does not fit",
        )


def install(venv: Path, python: Path, requirement_names: "list[str]", options: "tuple[str, ...]" = ()) -> None:
    """Install the requirement files and show the progress. Raises StartError with the last error lines."""
    check_disk(venv)
    if requirement_names:
        print_line("Installing " + " and ".join(Path(n).name for n in requirement_names) + f" into {venv}")
    last_lines = deque(maxlen=15)  # type: deque[str]
    exit_code = run(install_command(python, requirement_names, options), keep_errors_in=last_lines)
    if exit_code != 0:
        is_full = any("No space left" in line or "not enough space" in line.lower() for line in last_lines)
        cause = "the disk is full" if is_full else f"the installer ended with status {exit_code}"
        raise StartError(
            f"installing the packages failed: {cause}. Its last lines:\n\n"
            + "".join("    " + line for line in last_lines)
            + "\nRun the same command again to continue; finished downloads are kept. To start over, delete "
            + str(venv)
        )


def install_all(venv: Path, python: Path, names: "tuple[str, ...]", source: Source) -> "tuple[str, ...]":
    """Install requirement files. Return those that were installed.

    requirements.lock is checked by hashes, without torch, whose build depends on the GPU. Other wheels than PyPI's have
    other hashes: where the user's settings choose packages, they choose the versions too unless `source` names them.
    """
    settings_choose = ask_settings(python, source)
    is_hashed = TESTED in names and source.wheels is None and not settings_choose
    if TESTED in names and not is_hashed:
        names = tuple(source.versions or REQUIREMENTS if name == TESTED else name for name in names)
        chooser = "these wheels" if source.wheels else "your settings of pip or uv"
        print_line(f"Installing {names[0]} without hashes: {chooser} choose the packages")
    with_torch = not is_hashed and not source.torch
    if source.wheels is None and not (TESTED in names and with_torch):
        install_torch(venv, python, source.torch)
    wheels = () if source.wheels is None else ("--no-index", "--find-links", str(source.wheels))
    if TESTED in names:
        listed = venv / TESTED
        text = (ROOT / TESTED).read_text(encoding="utf-8")
        listed.write_text(format_entries(text, with_torch, with_hashes=is_hashed), encoding="utf-8")
        hashed = ("--require-hashes",) if is_hashed else ()
        install(venv, python, [str(listed)], (*wheels, *hashed, *(() if with_torch else ("--no-deps",))))
    others = [name for name in names if name != TESTED]
    if others:
        install(venv, python, others, wheels)
    return names


def ready_python(venv: Path, names: "tuple[str, ...]", source: "Source | None" = None) -> Path:
    """Return the environment's Python, after installing the requirement files if they are not up to date.

    `source` says where packages come from. Without versions in it, an environment that holds requirements.txt instead
    of requirements.lock is up to date too.

    Stamps are removed before the installer starts and written after it ends, so an interrupted installation is
    repeated.
    """
    source = source or Source()
    python = python_path(venv)
    version = read_version(python)
    if version is None:
        make_venv(venv)
        version = read_version(python)
        if version is None:
            raise StartError(f"{python} does not start", f"delete {venv} and run this command again")
    problem = python_problem(version[:2])
    if problem:
        raise StartError(
            f"{venv}: {problem}", "delete that folder or use another one with --venv", "--venv", "does not fit"
        )
    accepted = [names]
    if source.versions is None:
        accepted.append(tuple(REQUIREMENTS if name == TESTED else name for name in names))
    if source.torch or not any(is_installed(venv, version, choice) for choice in accepted):
        for path in venv.glob("start-*.stamp"):
            path.unlink()
        # Environments made by uv, and interrupted ones, have no pip.
        if shutil.which("uv") is None and run([str(python), "-m", "pip", "--version"], quiet=True) != 0:
            run([str(python), "-m", "ensurepip", "--default-pip"])
        installed = install_all(venv, python, names, source)
        for path, content in make_stamps(venv, version, installed).items():
            path.write_text(content, encoding="utf-8")
    return python


# --- running ---


def num_threads() -> int:
    """Return the number of CPU threads for the toy model."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_QUICKSTART_THREADS)


def training_command(python: Path) -> "list[str]":
    """Return the command that trains the quickstart's adapter, as on photos of one's own."""
    folder, name = ADAPTER.replace(".safetensors", "").rsplit("/", 1)
    command = [str(python), "train.py", PHOTOS, "--base", TOY_BASE, "--trigger", "heart", "--yes"]
    return [*command, "--output_dir", folder, "--name", name]


def image_command(python: Path) -> "list[str]":
    """Return the command that draws the same prompts without and with the adapter, also into the report."""
    command = [str(python), "tools/quickstart/draw_before_after.py", "--base", TOY_BASE, "--lora", ADAPTER]
    return [*command, "--prompts", PROMPTS, "--out", IMAGE, "--report", REPORT]


def pytest_command(python: Path, slow: bool, pytest_arguments: "list[str]") -> "list[str]":
    """Return the command that runs the fast tests, or with `slow` also whole training runs, in parallel.

    A `-m` among `pytest_arguments` overrides the selection. Test files among them run completely, except GPU tests.
    """
    tier = "not gpu and not nightly" if slow else "not slow and not gpu and not nightly"
    if any(argument.partition("::")[0].endswith(".py") for argument in pytest_arguments):
        tier = "not gpu"
    return [str(python), "-m", "pytest", "-m", tier, *parallel_arguments(), *pytest_arguments]


def simulated_gpu_command(python: Path, slow: bool) -> "list[str]":
    """Return the command that runs the GPU tests on a simulated GPU, which needs a process of its own."""
    tier = "gpu and not nightly" if slow else "gpu and not slow and not nightly"
    plugin = ["-p", "tests.simulated_gpu.plugin"]
    return [str(python), "-m", "pytest", *plugin, "-m", tier, *parallel_arguments(), *GPU_TESTS]


def parallel_arguments() -> "list[str]":
    """Return pytest's options for one worker per core, at most MAX_QUICKSTART_THREADS."""
    return [
        "-n",
        str(num_threads()),
        "--dist",
        "loadfile",  # a file's tests share expensive models
        "--no-loadscope-reorder",  # reordering by number of tests would put files with one long test last
    ]


def quickstart(venv: Path) -> int:
    """Train the bundled example and show what it learned. Return the exit status."""
    python = ready_python(venv, RUN_REQUIREMENTS)
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads()))
    for command, product in ((training_command(python), ADAPTER), (image_command(python), IMAGE)):
        if product == ADAPTER and (ROOT / ADAPTER).exists():
            # The same command would train once more, under a new name.
            print_line(f"\n{ADAPTER} is there already; to train it again, move {Path(ADAPTER).parent} away")
            continue
        print_line("\n$ " + " ".join(command))
        exit_code = run(command)
        if exit_code != 0:
            return exit_code
        if not (ROOT / product).exists():  # a training that is stopped saves under another name and ends with status 0
            raise StartError(
                f"the command above ended without an error but wrote no {product}: it was stopped before its last "
                "step. Start the quickstart again"
            )
    print_line(
        f"\nDone in {time.monotonic() - started:.0f} s.\n"
        f"  the adapter:             {ROOT / ADAPTER}\n"
        f"  an image, before|after:  {ROOT / IMAGE}\n"
        f"  report on the training:  {ROOT / REPORT} (opens in any browser)\n"
        "Training on your own images: README.md"
    )
    return 0


def train(venv: Path, script: str, names: "tuple[str, ...]", arguments: "list[str]") -> int:
    """Run train.py or the page where the user is, with access to the model hub. Return its exit status."""
    return replace_process([str(ready_python(venv, names)), str(ROOT / script), *arguments])


def run_tests(venv: Path, slow: bool, pytest_arguments: "list[str]") -> int:
    """Run the tests. Return pytest's exit status."""
    python = ready_python(venv, TEST_REQUIREMENTS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process per core
    gpu_status = 0 if pytest_arguments else run(simulated_gpu_command(python, slow))
    return gpu_status or run(pytest_command(python, slow, pytest_arguments))


def set_up(venv: Path, args: argparse.Namespace) -> int:
    """Create the environment as the command line says. Return the exit status."""
    if args.offline is not None and not any(args.offline.glob("*.whl")):
        raise StartError(
            f"--offline {args.offline} has no wheels",
            f"on a machine with a network run `python3 -m pip download -d {args.offline} -r requirements.txt`",
            "--offline",
            "missing",
        )
    versions = TESTED if args.locked else REQUIREMENTS if args.newest or args.offline else None
    names = (versions or TESTED,) if args.locked or args.offline else (versions or TESTED, FOR_TESTS)
    python = ready_python(venv, names, Source(args.offline, args.torch, versions))
    needs = torch_builds.describe_compiler_needs(python)
    if needs:
        print_line(f"note  {needs}")
    print_line(f"Ready: {python}")
    return 0


def run_doctor(venv: Path) -> int:
    """Run tools/doctor.py with the environment's Python, or with this one if there is no environment.

    Installs nothing. Returns the exit status of tools/doctor.py.
    """
    python = python_path(venv)
    if read_version(python) is None:
        print_line(f"note  {venv} is not ready, so this Python is checked; `tools/start.py setup` creates it")
        python = Path(sys.executable)
    return run([str(python), "tools/doctor.py"])


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser for the arguments before `--`."""
    common = CommandParser(add_help=False)
    common.add_argument(
        "--venv",
        type=Path,
        default=Path(os.environ.get("START_VENV") or ROOT / ".venv"),
        help="folder of the virtual environment (default: START_VENV if set, else .venv in this repository)",
    )
    add_errors_json(common)
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", metavar="page | quickstart | train | test | setup | doctor")
    commands.required = True
    setup = commands.add_parser("setup", parents=[common], help="create the environment, with the packages for tests")
    setup.add_argument("--torch", metavar="TAG", help="build of torch: cpu, cu126, rocm7.1, xpu ...; unset: by the GPU")
    setup.add_argument(
        "--offline", type=Path, metavar="DIR", help="install from the wheels in this folder (`pip download` fills it)"
    )
    versions = setup.add_mutually_exclusive_group()
    versions.add_argument("--locked", action="store_true", help="requirements.lock without the packages for tests")
    versions.add_argument("--newest", action="store_true", help="the newest versions instead of requirements.lock")
    commands.add_parser("doctor", parents=[common], help="check this machine, for you or a bug report")
    commands.add_parser(
        "quickstart", parents=[common], help="train a LoRA on the bundled toy model, draw before | after"
    )
    commands.add_parser(
        "train", parents=[common], allow_abbrev=False, help="train on your photos: `train PHOTOS --base FILE`"
    )
    commands.add_parser("page", parents=[common], allow_abbrev=False, help="open a page in the browser to train from")
    test = commands.add_parser(
        "test", parents=[common], help="run the tests: `test --slow -- -k dataset` also takes arguments of pytest"
    )
    test.add_argument("--slow", action="store_true", help="also the tests that take minutes, such as whole trainings")
    return parser


def split_at_dashes(arguments: "list[str]") -> "tuple[list[str], list[str]]":
    """Split a command line at its first `--`."""
    if "--" not in arguments:
        return arguments, []
    cut = arguments.index("--")
    return arguments[:cut], arguments[cut + 1 :]


def main(arguments: "list[str]") -> int:
    """Run the command line and return the exit status."""
    own_arguments, for_pytest = split_at_dashes(arguments)
    try:
        check_python(sys.version_info[:2])
        if isinstance(sys.stdout, io.TextIOWrapper):  # a Windows console may lack a character of a path
            sys.stdout.reconfigure(errors="backslashreplace")
        parser = setup_parser()
        args, for_training = parser.parse_known_args(own_arguments)
        if for_training and args.command not in ("train", "page"):
            parser.error(f"unrecognized arguments: {' '.join(for_training)}")
        venv = Path(os.path.abspath(str(args.venv)))
        for_training += [ERRORS_JSON] * (ERRORS_JSON in own_arguments)
        if args.command == "test":
            return run_tests(venv, args.slow, for_pytest)
        if for_pytest:
            parser.error(f"{args.command} takes no arguments after --")
        if args.command == "doctor":
            return run_doctor(venv)
        if args.command == "train":
            return train(venv, "train.py", RUN_REQUIREMENTS, for_training)
        if args.command == "page":
            return train(venv, "tools/page.py", PAGE_REQUIREMENTS, for_training)
        if args.command == "setup":
            return set_up(venv, args)
        return quickstart(venv)
    except StartError as error:
        print_error(error)
        if ERRORS_JSON in own_arguments and sys.version_info >= OLDEST_PYTHON:
            from library.base.error_lines import ErrorFields, print_error_line  # not for an old Python

            message, remedy, setting, cause = error.fields
            print_error_line(ErrorFields(message, remedy, setting, cause=cause))
        return 1
    except KeyboardInterrupt:
        print_line("stopped", sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
